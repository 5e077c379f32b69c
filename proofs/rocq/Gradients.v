(* Rewards, values, advantages, scores and the policy gradient.

   The reward is any function of the finished string of H tokens; a sum of rewards per token, and an outcome reward, are
   two of them. A parameter enters a policy through its score, the derivative of log pi(a|s): a function of history and
   token whose mean under the policy is 0. All here is about one parameter at a time (a coordinate of the gradient); the
   score of a softmax in its logits is a rational function of the probabilities, so nothing needs an exponential. *)

From mathcomp Require Import all_ssreflect all_algebra ring.
From ctpo Require Import Trees Expectations.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section Values.

Variables (R : realFieldType) (A : finType) (H : nat) (reward : seq A -> R) (p : policy R A).

(* V^p(s): the expected reward when p goes on from s; the reward itself once the string is finished. *)
Definition value s : R := E p (H - size s) s reward.

(* Q^p(s, a) and the advantage A^p(s, a) = Q^p(s, a) - V^p(s). *)
Definition action_value s a : R := value (rcons s a).
Definition advantage s a : R := action_value s a - value s.

(* J(p), the expected reward of a string. *)
Definition objective : R := E p H [::] reward.

(* V is the mean of Q. *)
Lemma value_next s : (size s < H)%N -> value s = next p s (action_value s).
Proof.
by move=> lt_sH; rewrite {1}/value -(subnSK lt_sH); apply: eq_bigr => a _; rewrite /action_value /value size_rcons.
Qed.

(* Q at a token is V after it, and the advantage is what V has gained. *)
Lemma step_action_value t w : (t < size w)%N -> step action_value t w = value (take t.+1 w).
Proof. by move=> /(@take_step R) [a [-> ->]]. Qed.

Lemma step_advantage t w : (t < size w)%N -> step advantage t w = step action_value t w - value (take t w).
Proof. by move=> /(@take_step R) [a [_ step_a]]; rewrite !step_a. Qed.

(* So the advantages along a string add up to its reward less the mean. *)
Lemma path_sum_advantage w : size w = H -> path_sum advantage w = reward w - objective.
Proof.
have telescope v : path_sum advantage v = value v - value [::].
  elim/last_ind: v => [|v a IHv]; first by rewrite path_sum_nil subrr.
  by rewrite path_sum_rcons IHv /advantage /action_value; ring.
by move=> sz_w; rewrite telescope /value sz_w subnn subn0.
Qed.

(* If q writes up to token t + 1 and p the rest, the reward is worth Q^p at that token. *)
Lemma E_action_value (q : policy R A) t X : (t < H)%N -> (forall w, size w = H -> X (take t.+1 w) = X w) ->
  E q t.+1 [::] (fun s => E p (H - t.+1) s (fun w => X w * reward w)) =
  E q H [::] (fun w => X w * step action_value t w).
Proof.
move=> lt_tH known; rewrite E_rest //; apply: eq_E => w /= sz_w.
by rewrite step_action_value ?sz_w // /value size_takel ?sz_w.
Qed.

End Values.

(* The performance difference lemma:  J(q) - J(p) = E_q[ sum_t A^p(s_t, a_t) ]. *)
Lemma performance_difference (R : realFieldType) (A : finType) (p q : policy R A) H (reward : seq A -> R) :
  objective H reward q - objective H reward p = E q H [::] (path_sum (advantage H reward p)).
Proof.
rewrite -[objective H reward p](E_const q H [::]) -E_sub; apply: eq_E => w sz_w.
by rewrite path_sum_advantage.
Qed.

Section Scores.

Variables (R : realFieldType) (A : finType) (p : policy R A).
Implicit Types g : seq A -> A -> R.

(* The derivative of a log-probability has mean 0 at every history, as probabilities sum to 1. *)
Definition is_score g := forall s, next p s (g s) = 0.

(* The softmax. key s names the logits that history s uses: the history itself (a tree with parameters of its own at
   each prefix), its length (parameters of each position) or a constant (one shared block). This is the derivative of
   log p(a|s) in the logit of token a' of block k; PolicyGradient.v derives it. *)
Definition softmax_score (K : eqType) (key : seq A -> K) (k : K) (a' : A) s a : R :=
  (key s == k)%:R * ((a == a')%:R - p s a').

(* The policy whose log-probabilities have moved by eps in direction g, to first order in eps: a polynomial in eps. *)
Definition moved g s a : {poly R} := (p s a)%:P + (p s a * g s a) *: 'X.

(* The derivative of the objective at eps = 0: the first-order coefficient of a polynomial. *)
Definition gradient g (H : nat) (reward : seq A -> R) : R := (E (moved g) H [::] (fun w => (reward w)%:P))`_1.

Lemma coef_moved g s a : (moved g s a)`_0 = p s a /\ (moved g s a)`_1 = p s a * g s a.
Proof. by rewrite !coefD !coefC !coefZ !coefX /= mulr0 mulr1 addr0 add0r. Qed.

(* The scores of a string have mean 0. *)
Lemma E_score g H : is_score g -> E p H [::] (path_sum g) = 0.
Proof. by move=> score; rewrite E_path_sum big1 // => t _; apply: E_step0. Qed.

End Scores.

(* --- first-order coefficients ------------------------------------------------------------------------------------- *)

Section Coefficients.

Variables (R : realFieldType) (A : finType).
Implicit Types (P Q : {poly R}) (f : seq A -> A -> {poly R}) (w : seq A).

Lemma coef0M P Q : (P * Q)`_0 = P`_0 * Q`_0.
Proof. by rewrite coefM big_ord_recl big_ord0 addr0. Qed.

Lemma coef1M P Q : (P * Q)`_1 = P`_0 * Q`_1 + P`_1 * Q`_0.
Proof. by rewrite coefM !big_ord_recl big_ord0 addr0. Qed.

Lemma coef_step f i t w : (step f t w)`_i = step (fun s a => (f s a)`_i) t w.
Proof. by rewrite /step; case: (drop t w) => [|//]; rewrite coef0. Qed.

(* The derivative of a product of factors that start at 1 is the sum of their derivatives. *)
Lemma coef_path_prod f (g : seq A -> A -> R) w : (forall s a, (f s a)`_0 = 1 /\ (f s a)`_1 = g s a) ->
  (path_prod f w)`_0 = 1 /\ (path_prod f w)`_1 = path_sum g w.
Proof.
move=> f_coef; elim/last_ind: w => [|w a [IH0 IH1]]; first by rewrite path_prod_nil path_sum_nil !coef1.
rewrite path_prod_rcons path_sum_rcons coef0M coef1M IH0 IH1 (f_coef w a).1 (f_coef w a).2.
by rewrite !mul1r mulr1 addrC.
Qed.

(* Expectations under a policy that does not move. *)
Lemma coef_E (p : seq A -> A -> R) n s (X : seq A -> {poly R}) i :
  (E (fun s a => (p s a)%:P) n s X)`_i = E p n s (fun w => (X w)`_i).
Proof. by elim: n s => //= n IHn s; rewrite coef_sum; apply: eq_bigr => a _; rewrite coefCM IHn. Qed.

End Coefficients.

(* The trace of a covariance matrix: the variances of the coordinates, added. *)
Definition trace_var (R : realFieldType) (A : finType) (I : finType) (p : policy R A) n s (X : I -> seq A -> R) : R :=
  \sum_(i : I) Var p n s (X i).
