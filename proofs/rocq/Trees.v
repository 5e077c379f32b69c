(* Token trees: policies, histories, expectations and the cumulative ratio.

   A language model writes one token after the other. A history is the sequence of the tokens written so far, the oldest
   first. The tokens are a finite type, the horizon H is any number, and a policy gives each token a probability that
   may depend on the whole history. Probabilities live in any ordered field (realFieldType): the rationals and the reals
   are two of them. What this covers: a prompt is the first token, one that both policies write with the same
   probabilities, as they do the tokens of a tool; a string that ends early goes on with a padding token that both write
   with probability 1. *)

From mathcomp Require Import all_ssreflect all_algebra ring.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(* --- policies ----------------------------------------------------------------------------------------------------- *)

(* p s a is the probability of token a after history s. *)
Record policy (R : realFieldType) (A : finType) := Policy {
  prob :> seq A -> A -> R;
  prob_ge0 : forall s a, 0 <= prob s a;
  prob_sum1 : forall s, \sum_(a : A) prob s a = 1
}.

Lemma prob_gt0 (R : realFieldType) (A : finType) (p : policy R A) s a : (0 < p s a) = (p s a != 0).
Proof. by rewrite lt_def prob_ge0 andbT. Qed.

(* --- functions of a step, and their sums and products along a string ---------------------------------------------- *)

Section Steps.

Variables (R : comRingType) (A : finType).
Implicit Types (f g : seq A -> A -> R) (s w : seq A).

(* f at token t + 1 of w, with the t tokens before it as history: f (a_1 .. a_t) a_{t+1}; 0 where w has ended. *)
Definition step f (t : nat) w : R := if drop t w is a :: _ then f (take t w) a else 0.

(* The sum and the product of f over the tokens of a string. *)
Definition path_sum f w : R := \sum_(t < size w) step f t w.
Definition path_prod f w : R := \prod_(t < size w) step f t w.

(* A step is known once its token is written. *)
Lemma step_take f t n w : (t < n)%N -> step f t (take n w) = step f t w.
Proof.
move=> lt_tn; rewrite /step take_take ?(ltnW lt_tn) //.
by rewrite -(subnK (ltnW lt_tn)) -take_drop -(subnSK lt_tn); case: (drop t w).
Qed.

Lemma step_rcons f w a : step f (size w) (rcons w a) = f w a.
Proof. by rewrite /step -cats1 drop_size_cat // take_size_cat. Qed.

Lemma step_cat f t w u : (t < size w)%N -> step f t (w ++ u) = step f t w.
Proof. by move=> lt_tw; rewrite -(step_take _ _ lt_tw) take_size_cat. Qed.

(* Token t + 1 of a string, and what a step is there. *)
Lemma take_step t w : (t < size w)%N ->
  exists a, take t.+1 w = rcons (take t w) a /\ forall f, step f t w = f (take t w) a.
Proof.
case: w => // x0 w lt_tw; exists (nth x0 (x0 :: w) t).
by split=> [|f]; [rewrite -take_nth | rewrite /step (drop_nth x0 lt_tw)].
Qed.

(* Steps are multiplied token by token. *)
Lemma step_mul f g t w : step f t w * step g t w = step (fun s a => f s a * g s a) t w.
Proof. by rewrite /step; case: (drop t w) => [|a _]; rewrite ?mulr0. Qed.

Lemma path_sumE f n w : size w = n -> path_sum f w = \sum_(t < n) step f t w.
Proof. by move=> <-. Qed.

Lemma path_sum_nil f : path_sum f [::] = 0.
Proof. by rewrite /path_sum big_ord0. Qed.

Lemma path_prod_nil f : path_prod f [::] = 1.
Proof. by rewrite /path_prod big_ord0. Qed.

Lemma path_sum_rcons f w a : path_sum f (rcons w a) = path_sum f w + f w a.
Proof.
rewrite /path_sum size_rcons big_ord_recr step_rcons; congr (_ + _).
by apply: eq_bigr => t _; rewrite -cats1 /= step_cat.
Qed.

Lemma path_prod_rcons f w a : path_prod f (rcons w a) = path_prod f w * f w a.
Proof.
rewrite /path_prod size_rcons big_ord_recr step_rcons; congr (_ * _).
by apply: eq_bigr => t _; rewrite -cats1 /= step_cat.
Qed.

Lemma path_sum_take f n w : (n <= size w)%N -> path_sum f (take n w) = \sum_(t < n) step f t w.
Proof.
move=> le_nw; rewrite /path_sum size_takel //.
by apply: eq_bigr => t _; apply: step_take.
Qed.

Lemma path_sum_takeS f t w : (t < size w)%N -> path_sum f (take t.+1 w) = path_sum f (take t w) + step f t w.
Proof. by move=> lt_tw; rewrite !path_sum_take ?(ltnW lt_tw) // big_ord_recr. Qed.

Lemma path_prod_take f n w : (n <= size w)%N -> path_prod f (take n w) = \prod_(t < n) step f t w.
Proof.
move=> le_nw; rewrite /path_prod size_takel //.
by apply: eq_bigr => t _; apply: step_take.
Qed.

End Steps.

(* --- expectations ------------------------------------------------------------------------------------------------- *)

Section Expectation.

Variables (R : comRingType) (A : finType).
Implicit Types (p : seq A -> A -> R) (s w : seq A) (X Y : seq A -> R) (c : R).

(* E p n s X: the expectation of X when the history is s and p writes n more tokens. So E p H [::] X is the expectation
   over strings of H tokens, and E p (H - t) s X, as a function of the history s of t tokens, is the conditional
   expectation E_p [X | F_t]. *)
Fixpoint E p n s X : R := if n is n'.+1 then \sum_(a : A) p s a * E p n' (rcons s a) X else X s.

(* The variance, the covariance, the probability of an event, and the mean under p of a function of the next token. *)
Definition Var p n s X := E p n s (fun w => X w ^+ 2) - E p n s X ^+ 2.
Definition Cov p n s X Y := E p n s (fun w => X w * Y w) - E p n s X * E p n s Y.
Definition Pr p n (D : pred (seq A)) : R := E p n [::] (fun w => (D w)%:R).
Definition next p s (f : A -> R) := \sum_(a : A) p s a * f a.

(* Only the strings of n tokens after s count. *)
Lemma eq_E p n s X Y : (forall u, size u = n -> X (s ++ u) = Y (s ++ u)) -> E p n s X = E p n s Y.
Proof.
elim: n s => [|n IHn] s /= eqXY; first by rewrite -[s]cats0 eqXY.
apply: eq_bigr => a _; congr (_ * _); apply: IHn => u sz_u.
by rewrite cat_rcons eqXY //= sz_u.
Qed.

Lemma eq_Var p n s X Y : (forall u, size u = n -> X (s ++ u) = Y (s ++ u)) -> Var p n s X = Var p n s Y.
Proof. by move=> eqXY; congr (_ - _ ^+ 2); apply: eq_E => u /eqXY // ->. Qed.

Lemma E_add p n s X Y : E p n s (fun w => X w + Y w) = E p n s X + E p n s Y.
Proof.
elim: n s => //= n IHn s; rewrite -big_split /=.
by apply: eq_bigr => a _; rewrite IHn mulrDr.
Qed.

Lemma E_scale p n s c X : E p n s (fun w => c * X w) = c * E p n s X.
Proof.
elim: n s => //= n IHn s; rewrite big_distrr /=.
by apply: eq_bigr => a _; rewrite IHn mulrCA.
Qed.

Lemma E_opp p n s X : E p n s (fun w => - X w) = - E p n s X.
Proof.
rewrite -mulN1r -E_scale; apply: eq_E => u _.
by rewrite mulN1r.
Qed.

Lemma E_sub p n s X Y : E p n s (fun w => X w - Y w) = E p n s X - E p n s Y.
Proof. by rewrite E_add E_opp. Qed.

Lemma E0 p n s : E p n s (fun=> 0) = 0.
Proof. by elim: n s => //= n IHn s; apply: big1 => a _; rewrite IHn mulr0. Qed.

Lemma E_sum p n s I (r : seq I) (P : pred I) (X : I -> seq A -> R) :
  E p n s (fun w => \sum_(i <- r | P i) X i w) = \sum_(i <- r | P i) E p n s (X i).
Proof.
elim: r => [|i r IHr]; first by rewrite big_nil -[RHS](E0 p n s); apply: eq_E => u _; rewrite big_nil.
rewrite big_cons -IHr; case: ifP => Pi; last by apply: eq_E => u _; rewrite big_cons Pi.
by rewrite -E_add; apply: eq_E => u _; rewrite big_cons Pi.
Qed.

(* The law of total expectation: first m tokens, then n more. *)
Lemma E_tower p m n s X : E p (m + n) s X = E p m s (fun u => E p n u X).
Proof. by elim: m s => //= m IHm s; apply: eq_bigr => a _; rewrite IHm. Qed.

Lemma E_split p H t X : (t <= H)%N -> E p H [::] X = E p t [::] (fun s => E p (H - t) s X).
Proof. by move=> le_tH; rewrite -{1}(subnKC le_tH) E_tower. Qed.

(* What is known comes out of a conditional expectation. *)
Lemma E_known p n s (Y : seq A -> R) X : E p n s (fun w => Y (take (size s) w) * X w) = Y s * E p n s X.
Proof. by rewrite -E_scale; apply: eq_E => u _; rewrite take_size_cat. Qed.

(* The expectation as the sum over all strings of their probability times their value. *)
Lemma E_big p n s X :
  E p n s X = \sum_(u : n.-tuple A) (\prod_(t < n) step p (size s + t) (s ++ u)) * X (s ++ u).
Proof.
elim: n s => [|n IHn] s /=.
  rewrite (big_pred1 [tuple]) => [|u]; last by rewrite [u]tuple0; apply/esym/eqP/val_inj.
  by rewrite big_ord0 mul1r cats0.
rewrite (reindex (fun v : A * n.-tuple A => [tuple of v.1 :: v.2])) /=; last first.
  exists (fun u : n.+1.-tuple A => (thead u, [tuple of behead u])) => [[a u] _ | u _] /=.
    by congr (_, _); apply: val_inj.
  by rewrite -tuple_eta.
rewrite -(pair_big xpredT xpredT (fun a (u : n.-tuple A) =>
  (\prod_(t < n.+1) step p (size s + t) (s ++ a :: u)) * X (s ++ a :: u))) /=.
apply: eq_bigr => a _; rewrite IHn big_distrr /=; apply: eq_bigr => u _.
rewrite big_ord_recl /= addn0 -cat_rcons step_cat ?size_rcons // step_rcons -!mulrA.
congr (_ * (_ * _)); apply: eq_bigr => t _.
by rewrite addSnnS.
Qed.

End Expectation.

(* --- expectations under a policy ---------------------------------------------------------------------------------- *)

Section UnderPolicy.

Variables (R : realFieldType) (A : finType) (p : policy R A).
Implicit Types (s w : seq A) (X Y : seq A -> R).

Lemma E_const n s (c : R) : E p n s (fun=> c) = c.
Proof.
elim: n s => //= n IHn s.
transitivity (\sum_a p s a * c); first by apply: eq_bigr => a _; rewrite IHn.
by rewrite -big_distrl /= prob_sum1 mul1r.
Qed.

Lemma E_past n s X : E p n s (fun w => X (take (size s) w)) = X s.
Proof. by rewrite -[RHS](E_const n s); apply: eq_E => u _; rewrite take_size_cat. Qed.

(* The expectation of what is known after t tokens does not depend on how the string goes on. *)
Lemma E_prefix H t X : (t <= H)%N -> E p H [::] (fun w => X (take t w)) = E p t [::] X.
Proof.
move=> le_tH; rewrite (E_split _ _ le_tH); apply: eq_E => s /= sz_s.
by rewrite -sz_s E_past.
Qed.

Lemma E_ge0 n s X : (forall w, 0 <= X w) -> 0 <= E p n s X.
Proof.
move=> X_ge0; elim: n s => //= n IHn s.
by apply: sumr_ge0 => a _; rewrite mulr_ge0 // prob_ge0.
Qed.

Lemma E_le n s X Y : (forall w, X w <= Y w) -> E p n s X <= E p n s Y.
Proof.
move=> leXY; rewrite -subr_ge0 -E_sub.
by apply: E_ge0 => w; rewrite subr_ge0.
Qed.

(* The mean squared distance from a number: least from the mean, where it is the variance. *)
Lemma E_around n s X c : E p n s (fun w => (X w - c) ^+ 2) = Var p n s X + (E p n s X - c) ^+ 2.
Proof.
transitivity (E p n s (fun w => X w ^+ 2 - (2%:R * c) * X w + c ^+ 2)); first by apply: eq_E => u _; ring.
by rewrite E_add E_sub E_scale E_const /Var; move: (E _ _ _ _) (E _ _ _ _) => y m; ring.
Qed.

Lemma Var_centered n s X : Var p n s X = E p n s (fun w => (X w - E p n s X) ^+ 2).
Proof. by rewrite E_around subrr expr0n addr0. Qed.

Lemma Var_ge0 n s X : 0 <= Var p n s X.
Proof. by rewrite Var_centered E_ge0 // => w; rewrite sqr_ge0. Qed.

(* A non-negative variable with expectation 0 is 0 on every string that p can write. *)
Lemma E_eq0 n s X : (forall w, 0 <= X w) -> E p n s X = 0 ->
  forall u, size u = n -> 0 < \prod_(t < n) step p (size s + t) (s ++ u) -> X (s ++ u) = 0.
Proof.
move=> X_ge0; rewrite E_big => /eqP.
rewrite psumr_eq0 => [/allP zero u sz_u pos_u|u _]; last first.
  apply: mulr_ge0 => //; apply: prodr_ge0 => t _.
  by rewrite /step; case: (drop _ _) => // a _; apply: prob_ge0.
have /eqP sz : size u == n by rewrite sz_u.
have := zero (Tuple (introT eqP sz)) (mem_index_enum _).
by rewrite mulf_eq0 (negbTE (lt0r_neq0 pos_u)) /= => /eqP.
Qed.

End UnderPolicy.

(* --- the two policies --------------------------------------------------------------------------------------------- *)

Section Ratio.

Variables (R : realFieldType) (A : finType) (b pi : policy R A).
Implicit Types (s w u : seq A) (X Y : seq A -> R).

(* The probability of a string, and the strings that a policy can write. *)
Definition string_prob (p : policy R A) s : R := path_prod p s.
Definition reachable (p : policy R A) s := 0 < string_prob p s.

(* The importance ratio of a token, of a string (the cumulative ratio rho_t, of its first t tokens), and its divergence
   chi2(s) = sum_a pi(a|s)^2 / b(a|s) - 1 at a history. In a field of mathcomp x / 0 = 0. *)
Definition ratio s a : R := pi s a / b s a.
Definition rho s : R := path_prod ratio s.
Definition chi2 s : R := \sum_(a : A) pi s a ^+ 2 / b s a - 1.

(* (AC), absolute continuity: pi writes no token that b never writes, where b can get to. It speaks of histories of
   every length, which costs nothing where strings have H tokens: let pi be b after that. *)
Definition absolutely_continuous := forall s a, reachable b s -> b s a = 0 -> pi s a = 0.

Lemma string_prob_rcons (p : policy R A) s a : string_prob p (rcons s a) = string_prob p s * p s a.
Proof. exact: path_prod_rcons. Qed.

Lemma string_prob_nil (p : policy R A) : string_prob p [::] = 1.
Proof. exact: path_prod_nil. Qed.

Lemma string_prob_ge0 (p : policy R A) s : 0 <= string_prob p s.
Proof.
apply: prodr_ge0 => t _; rewrite /step.
by case: (drop _ _) => // a _; apply: prob_ge0.
Qed.

Lemma reachable_nil (p : policy R A) : reachable p [::].
Proof. by rewrite /reachable string_prob_nil ltr01. Qed.

Lemma reachable_rcons (p : policy R A) s a : reachable p (rcons s a) = reachable p s && (0 < p s a).
Proof.
rewrite /reachable string_prob_rcons; apply/idP/andP => [pos | [s_gt0 a_gt0]]; last exact: mulr_gt0.
have := string_prob_ge0 p s; have := prob_ge0 p s a; rewrite !le_eqVlt.
by move=> /predU1P[a0 | ->] /predU1P[s0 | ->] //; move: pos; rewrite -?a0 -?s0 ?mulr0 ?mul0r ltxx.
Qed.

Lemma rho_nil : rho [::] = 1.
Proof. exact: path_prod_nil. Qed.

Lemma rho_rcons s a : rho (rcons s a) = rho s * ratio s a.
Proof. exact: path_prod_rcons. Qed.

Lemma rho_ge0 s : 0 <= rho s.
Proof.
apply: prodr_ge0 => t _; rewrite /step.
by case: (drop _ _) => // a _; rewrite divr_ge0 ?prob_ge0.
Qed.

(* Where b can get to, the ratio of the string is the ratio of its probabilities: rho = P_pi / P_b. *)
Lemma rho_string_prob s : reachable b s -> rho s = string_prob pi s / string_prob b s.
Proof.
elim/last_ind: s => [|s a IHs]; first by rewrite rho_nil !string_prob_nil divr1.
rewrite reachable_rcons => /andP[reach _].
by rewrite rho_rcons IHs // !string_prob_rcons mulf_div.
Qed.

(* Only strings that b can write count. *)
Lemma eq_E_reachable n s X Y :
  reachable b s -> (forall u, size u = n -> reachable b (s ++ u) -> X (s ++ u) = Y (s ++ u)) ->
  E b n s X = E b n s Y.
Proof.
elim: n s => [|n IHn] s reach eqXY /=; first by rewrite -[s]cats0 eqXY ?cats0.
apply: eq_bigr => a _; have [a0 | a_neq0] := eqVneq (b s a) 0; first by rewrite a0 !mul0r.
have a_gt0 : 0 < b s a by rewrite prob_gt0.
congr (_ * _); apply: IHn => [|u sz_u]; first by rewrite reachable_rcons reach.
by rewrite cat_rcons; apply: eqXY; rewrite /= sz_u.
Qed.

Hypothesis AC : absolutely_continuous.

Lemma b_ratio s a : reachable b s -> b s a * ratio s a = pi s a.
Proof.
move=> reach; rewrite /ratio; have [a0 | a_neq0] := eqVneq (b s a) 0.
  by rewrite (AC reach a0) mul0r mulr0.
by rewrite mulrC divfK.
Qed.

(* The change of measure, from which all else follows: under b, the ratio rho makes every expectation one under pi. *)
Theorem change_of_measure n s X : reachable b s -> E b n s (fun w => rho w * X w) = rho s * E pi n s X.
Proof.
elim: n s => //= n IHn s reach; rewrite big_distrr /=; apply: eq_bigr => a _.
have [a0 | a_neq0] := eqVneq (b s a) 0; first by rewrite a0 (AC reach a0) !mul0r mulr0.
have a_gt0 : 0 < b s a by rewrite prob_gt0.
by rewrite IHn ?reachable_rcons ?reach // rho_rcons -(b_ratio a reach) -!mulrA [LHS]mulrCA.
Qed.

(* What the ratio of a step does to a function of the next token. *)
Lemma next_ratio s (f : A -> R) : reachable b s -> next b s (fun a => ratio s a * f a) = next pi s f.
Proof. by move=> reach; apply: eq_bigr => a _; rewrite mulrA b_ratio. Qed.

End Ratio.

#[global] Hint Resolve reachable_nil : core.
