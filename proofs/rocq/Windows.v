(* Log-ratios and clip windows: the drift, the variance, and why a window c_t = o(t) around 0 cannot have a flat rate.

   A logarithm is not a rational function, and nothing here needs one: l s a is any function of history and token, to be
   read as log (pi(a|s) / b(a|s)), and path_sum l as log rho. What a theorem needs of the logarithm is among its
   premises: that log x <= x - 1 (Gibbs' inequality), or that 2^l is the ratio. A square root enters as a number c >= 0
   with c^2 = eps^2 t. "t large enough" needs that no number of the field exceeds all integers; theorems that say it
   are about any archiFieldType, as the rationals and the reals are, all others about any realFieldType. *)

From mathcomp Require Import all_ssreflect all_algebra ring.
From ctpo Require Import Trees Expectations Gradients Coins.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(* --- covariances and probabilities -------------------------------------------------------------------------------- *)

Section Moments.

Variables (R : realFieldType) (A : finType) (b : policy R A).
Implicit Types (s w u : seq A) (X Y Z : seq A -> R) (n t : nat).

Lemma eq_Cov n X Y Y' : (forall u, size u = n -> Y u = Y' u) -> Cov b n [::] X Y = Cov b n [::] X Y'.
Proof. by move=> eqY; rewrite /Cov; congr (_ - _ * _); apply: eq_E => u sz_u; rewrite eqY. Qed.

Lemma CovC n X Y : Cov b n [::] X Y = Cov b n [::] Y X.
Proof. by rewrite /Cov [X in _ - X]mulrC; congr (_ - _); apply: eq_E => u _; rewrite mulrC. Qed.

Lemma Cov_add n X Y Z : Cov b n [::] X (fun w => Y w + Z w) = Cov b n [::] X Y + Cov b n [::] X Z.
Proof.
have eqXYZ : E b n [::] (fun w => X w * (Y w + Z w)) = E b n [::] (fun w => X w * Y w + X w * Z w).
  by apply: eq_E => u _; rewrite mulrDr.
by rewrite /Cov eqXYZ !E_add mulrDr opprD addrACA.
Qed.

Lemma Cov_opp n X Y : Cov b n [::] X (fun w => - Y w) = - Cov b n [::] X Y.
Proof.
have eqXY : E b n [::] (fun w => X w * - Y w) = E b n [::] (fun w => - (X w * Y w)).
  by apply: eq_E => u _; rewrite mulrN.
by rewrite /Cov eqXY !E_opp mulrN opprB opprK addrC.
Qed.

Lemma Cov_sum n X (Y : nat -> seq A -> R) m :
  Cov b n [::] X (fun w => \sum_(k < m) Y k w) = \sum_(k < m) Cov b n [::] X (Y k).
Proof.
elim: m => [|m IHm].
  have eq0 : E b n [::] (fun w => X w * \sum_(k < 0) Y k w) = 0.
    by rewrite -[RHS](E0 b n [::]); apply: eq_E => u _; rewrite big_ord0 mulr0.
  by rewrite big_ord0 /Cov eq0 E_sum big_ord0 mulr0 subrr.
rewrite big_ord_recr /= -IHm -Cov_add.
by apply: eq_Cov => u _; rewrite big_ord_recr.
Qed.

Lemma Var_add n X Y : Var b n [::] (fun w => X w + Y w) = Var b n [::] X + Var b n [::] Y + 2%:R * Cov b n [::] X Y.
Proof.
have eqXY : E b n [::] (fun w => (X w + Y w) ^+ 2) =
    E b n [::] (fun w => X w ^+ 2 + 2%:R * (X w * Y w) + Y w ^+ 2).
  by apply: eq_E => u _; rewrite sqrrD -mulr_natl.
rewrite /Var eqXY !E_add E_scale /Cov; move: (E b n [::] (fun w => X w * Y w)) (E b n [::] X) (E b n [::] Y).
by move: (E b n [::] _) (E b n [::] _) => x2 y2 xy x y; ring.
Qed.

(* The variance of a sum: the variances, and twice the covariances. *)
Lemma Var_sum n (X : nat -> seq A -> R) m : Var b n [::] (fun w => \sum_(t < m) X t w) =
  \sum_(t < m) Var b n [::] (X t) + 2%:R * \sum_(t < m) \sum_(k < t) Cov b n [::] (X k) (X t).
Proof.
elim: m => [|m IHm].
  have eq0 : E b n [::] (fun w => (\sum_(t < 0) X t w) ^+ 2) = 0.
    by rewrite -[RHS](E0 b n [::]); apply: eq_E => u _; rewrite big_ord0 expr0n.
  by rewrite !big_ord0 mulr0 addr0 /Var eq0 E_sum big_ord0 expr0n subrr.
have -> : Var b n [::] (fun w => \sum_(t < m.+1) X t w) = Var b n [::] (fun w => \sum_(t < m) X t w + X m w).
  by apply: eq_Var => u _; rewrite big_ord_recr.
have cov_m : Cov b n [::] (fun w => \sum_(t < m) X t w) (X m) = \sum_(k < m) Cov b n [::] (X k) (X m).
  by rewrite CovC Cov_sum; apply: eq_bigr => k _; rewrite CovC.
by rewrite Var_add IHm cov_m !big_ord_recr /= mulrDr [RHS]addrA; congr (_ + _); rewrite addrAC.
Qed.

Lemma Pr_ge0 n e : 0 <= Pr b n e.
Proof. by apply: E_ge0 => w; rewrite ler0n. Qed.

Lemma Pr_le n (e f : pred (seq A)) : (forall u, size u = n -> e u -> f u) -> Pr b n e <= Pr b n f.
Proof.
move=> sub; apply: E_le_reachable => u sz_u _.
by case e_u: (e u); rewrite ?ler0n // sub.
Qed.

Lemma Pr_not n e : Pr b n (fun w => ~~ e w) = 1 - Pr b n e.
Proof.
rewrite -(E_const b n [::] 1) /Pr -E_sub.
by apply: eq_E => u _; case: (e u); rewrite ?subrr ?subr0.
Qed.

Lemma Pr_le1 n e : Pr b n e <= 1.
Proof. by rewrite -subr_ge0 -Pr_not Pr_ge0. Qed.

(* Markov's inequality for a square, from which Chebyshev's. *)
Lemma markov_square n X c : 0 < c -> Pr b n (fun w => c <= `|X w|) <= E b n [::] (fun w => X w ^+ 2) / c ^+ 2.
Proof.
move=> c_gt0; have c2_gt0 : 0 < c ^+ 2 by rewrite exprn_gt0.
rewrite ler_pdivl_mulr // mulrC -E_scale; apply: E_le => w.
have [le_c|_] := boolP (c <= `|X w|); last by rewrite mulr0 sqr_ge0.
by rewrite mulr1 -[X w ^+ 2]real_normK ?num_real // ler_expn2r ?nnegrE ?(ltW c_gt0).
Qed.

Lemma chebyshev n X c : 0 < c -> Pr b n (fun w => c <= `|X w - E b n [::] X|) <= Var b n [::] X / c ^+ 2.
Proof. by move=> c_gt0; rewrite Var_centered; apply: markov_square. Qed.

(* The mean of a token, given what came before. *)
Lemma E_next n s f : E b n.+1 s (step f (size s)) = next b s (f s).
Proof.
rewrite /=; apply: eq_bigr => a _; congr (_ * _).
rewrite -[RHS](E_past b n (rcons s a) (fun=> f s a)); apply: eq_E => u _.
by rewrite step_cat ?size_rcons // step_rcons.
Qed.

End Moments.

(* --- 7.drift and 7.variance --------------------------------------------------------------------------------------- *)

Section Drift.

Variables (R : realFieldType) (A : finType) (b : policy R A) (l : seq A -> A -> R).
Implicit Types (s w u : seq A) (H t k n : nat).

(* kappa(s) = - sum_a b(a|s) l(s,a). Where l is the logarithm of the ratio, this is KL(b||pi) at history s. *)
Definition kappa s : R := - next b s (l s).

(* What is left of a token's log-ratio without its mean, and the mean of its square, the variance given the history. *)
Definition fluctuation s a : R := l s a + kappa s.
Definition token_variance s : R := next b s (fun a => fluctuation s a ^+ 2).

Lemma next_fluctuation s : next b s (fluctuation s) = 0.
Proof.
transitivity (next b s (l s) + kappa s); last by rewrite addrN.
rewrite /next -[kappa s]mul1r -(prob_sum1 b s) big_distrl -big_split /=.
by apply: eq_bigr => a _; rewrite -mulrDr.
Qed.

Lemma step_fluctuation t w : (t < size w)%N -> step fluctuation t w = step l t w + kappa (take t w).
Proof. by move=> /(@take_step R) [a [_ step_a]]; rewrite !step_a. Qed.

(* 7.drift: E_b log rho_t = - sum_{k<t} E_b kappa(s_k), for every t. Each token's mean, given what came before it, is
   -kappa; the law of total expectation adds these up. *)
Theorem claim_7_drift H t : (t <= H)%N ->
  E b H [::] (fun w => path_sum l (take t w)) = - \sum_(k < t) E b H [::] (fun w => kappa (take k w)).
Proof.
move=> le_tH; transitivity (E b H [::] (fun w => \sum_(k < t) step l k w)).
  by apply: eq_E => u sz_u; rewrite path_sum_take // sz_u.
rewrite E_sum -sumrN; apply: eq_bigr => k _; have lt_kH := leq_trans (ltn_ord k) le_tH.
by rewrite E_step // E_prefix ?(ltnW lt_kH) // -E_opp; apply: eq_E => u _; rewrite /kappa opprK.
Qed.

(* log r_t + kappa(s_t) are martingale differences: given any history, their mean is 0. *)
Theorem claim_7_drift_martingale H s : (size s < H)%N ->
  E b (H - size s) s (fun w => step l (size s) w + kappa (take (size s) w)) = 0.
Proof.
move=> lt_sH; rewrite -(next_fluctuation s) -(@E_next _ _ b (H - size s).-1) prednK ?subn_gt0 //.
by apply: eq_E => u sz_u; rewrite step_fluctuation // size_cat sz_u -[X in (X < _)%N]addn0 ltn_add2l subn_gt0.
Qed.

(* Gibbs' inequality: kappa >= 0, as log x <= x - 1 on the tokens that b writes, and pi sums to 1. So log rho_t can only
   fall in the mean. *)
Theorem claim_7_drift_gibbs (pi : policy R A) s :
  (forall a, 0 < b s a -> l s a <= ratio b pi s a - 1) -> 0 <= kappa s.
Proof.
move=> gibbs; rewrite oppr_ge0; apply: (@le_trans _ _ (\sum_a (pi s a - b s a))).
  apply: ler_sum => a _; have [a0 | a_neq0] := eqVneq (b s a) 0; first by rewrite a0 mul0r subr0 prob_ge0.
  have a_gt0 : 0 < b s a by rewrite prob_gt0.
  apply: le_trans (ler_wpmul2l (ltW a_gt0) (gibbs a a_gt0)) _.
  by rewrite mulrBr mulr1 /ratio mulrC divfK.
by rewrite sumrB !prob_sum1 subrr.
Qed.

(* And it does fall where pi differs from b: kappa > 0, as log x < x - 1 unless x = 1. *)
Theorem claim_7_drift_strict (pi : policy R A) s :
  (forall a, 0 < b s a -> l s a <= ratio b pi s a - 1 ?= iff (ratio b pi s a == 1)) ->
  (exists a, pi s a != b s a) -> 0 < kappa s.
Proof.
move=> gibbs [a1 neq1]; rewrite oppr_gt0.
pose gap a := pi s a - b s a - b s a * l s a.
have gap_ge0 a : 0 <= gap a.
  rewrite subr_ge0; have [a0 | a_neq0] := eqVneq (b s a) 0; first by rewrite a0 mul0r subr0 prob_ge0.
  have a_gt0 : 0 < b s a by rewrite prob_gt0.
  apply: le_trans (ler_wpmul2l (ltW a_gt0) (gibbs a a_gt0)) _.
  by rewrite mulrBr mulr1 /ratio mulrC divfK.
have sum_gap : \sum_a gap a = - next b s (l s) by rewrite !sumrB !prob_sum1 subrr sub0r.
rewrite -oppr_gt0 -sum_gap lt_def sumr_ge0 ?andbT //; apply/negP.
rewrite psumr_eq0 // => /allP gap0; have := gap0 a1 (mem_index_enum _); rewrite /= subr_eq0.
have [b0 | b_neq0] := eqVneq (b s a1) 0; first by rewrite b0 mul0r subr0 -b0 (negbTE neq1).
have b_gt0 : 0 < b s a1 by rewrite prob_gt0.
have -> : pi s a1 - b s a1 = b s a1 * (ratio b pi s a1 - 1) by rewrite mulrBr mulr1 /ratio mulrC divfK.
rewrite (inj_eq (mulfI b_neq0)) eq_sym (gibbs a1 b_gt0) /ratio -[X in _ == X](divff b_neq0).
by rewrite (inj_eq (divIf b_neq0)) (negbTE neq1).
Qed.

(* What is known before a token does not covary with its fluctuation. *)
Lemma Cov_fluctuation H t (Y : seq A -> R) : (t < H)%N -> (forall w, Y (take t w) = Y w) ->
  Cov b H [::] Y (step fluctuation t) = 0.
Proof.
move=> lt_tH known; rewrite /Cov (E_centered lt_tH next_fluctuation) // (E_step0 lt_tH next_fluctuation).
by rewrite mulr0 subrr.
Qed.

(* Cov(l_k, l_t) = - Cov(l_k, kappa(s_t)) for tokens k < t: tokens covary only through the divergence that they lead
   to. *)
Theorem claim_7_variance_covariance H k t : (k < t)%N -> (t < H)%N ->
  Cov b H [::] (step l k) (step l t) = - Cov b H [::] (step l k) (fun w => kappa (take t w)).
Proof.
move=> lt_kt lt_tH; apply/eqP; rewrite -subr_eq0 opprK -Cov_add.
rewrite -(@Cov_fluctuation H t (step l k)) // => [|w]; last exact: step_take.
by apply/eqP/eq_Cov => u sz_u; rewrite step_fluctuation // sz_u.
Qed.

(* Var(log rho_n) = sum_t Var(log r_t) - 2 sum_{k<t} Cov(log r_k, kappa(s_t)). *)
Theorem claim_7_variance_sum n : Var b n [::] (path_sum l) =
  \sum_(t < n) Var b n [::] (step l t) -
  2%:R * \sum_(t < n) \sum_(k < t) Cov b n [::] (step l k) (fun w => kappa (take t w)).
Proof.
transitivity (Var b n [::] (fun w => \sum_(t < n) step l t w)).
  by apply: eq_Var => u sz_u; rewrite (path_sumE l sz_u).
rewrite Var_sum -mulrN -sumrN; congr (_ + _ * _); apply: eq_bigr => t _.
rewrite -sumrN; apply: eq_bigr => k _.
by rewrite claim_7_variance_covariance.
Qed.

(* 7.variance: the variance of log rho_n is the sum of the variances of its tokens' if and only if the covariances of
   log r_k with the later divergence kappa(s_t) add up to 0. *)
Theorem claim_7_variance_criterion n :
  Var b n [::] (path_sum l) = \sum_(t < n) Var b n [::] (step l t) <->
  \sum_(t < n) \sum_(k < t) Cov b n [::] (step l k) (fun w => kappa (take t w)) = 0.
Proof.
rewrite claim_7_variance_sum; set c := \sum_(t < n) \sum_(k < t) _; split=> [/eqP | ->]; last by rewrite mulr0 subr0.
by rewrite -subr_eq0 addrC addKr oppr_eq0 mulf_eq0 pnatr_eq0 => /eqP.
Qed.

(* It suffices that the divergence does not depend on the history but on its length, where b can get to. *)
Theorem claim_7_variance_prefix_constant n (kappa_at : nat -> R) :
  (forall s, reachable b s -> kappa s = kappa_at (size s)) ->
  Var b n [::] (path_sum l) = \sum_(t < n) Var b n [::] (step l t).
Proof.
move=> const; apply/claim_7_variance_criterion; apply: big1 => t _; apply: big1 => k _; rewrite /Cov.
have at_t X : E b n [::] (fun w => X w * kappa (take t w)) = E b n [::] (fun w => kappa_at t * X w).
  apply: eq_E_reachable => // u sz_u reach.
  by rewrite const ?size_takel ?sz_u ?(ltnW (ltn_ord t)) ?reachable_take // mulrC.
have at_t1 : E b n [::] (fun w => kappa (take t w)) = kappa_at t.
  rewrite -[RHS](E_const b n [::]) -[LHS](@eq_E _ _ b n [::] (fun w => 1 * kappa (take t w))) => [|u _].
    by rewrite at_t; apply: eq_E => u _; rewrite mulr1.
  by rewrite mul1r.
by rewrite at_t at_t1 E_scale mulrC subrr.
Qed.

(* The sum of kappa along the first n tokens. log rho plus it is a martingale, whose variance is that of its tokens. *)
Definition kappa_sum n w : R := \sum_(t < n) kappa (take t w).

Lemma path_sum_fluctuation n w : size w = n -> path_sum fluctuation w = path_sum l w + kappa_sum n w.
Proof. by move=> <-; rewrite /path_sum -big_split; apply: eq_bigr => t _; rewrite step_fluctuation. Qed.

Lemma Var_fluctuation n : Var b n [::] (path_sum fluctuation) = \sum_(t < n) E b t [::] token_variance.
Proof.
transitivity (Var b n [::] (fun w => \sum_(t < n) step fluctuation t w)).
  by apply: eq_Var => u sz_u; rewrite (path_sumE _ sz_u).
rewrite Var_sum [X in _ * X]big1 => [|t _]; last first.
  by apply: big1 => k _; apply: Cov_fluctuation => // w; apply: step_take.
rewrite mulr0 addr0; apply: eq_bigr => t _; rewrite /Var (E_step0 (ltn_ord t) next_fluctuation) expr0n.
by rewrite subr0 (E_token b (ltn_ord t) fluctuation (fun _ x => x ^+ 2)).
Qed.

(* The whole of it: with K = sum_t kappa(s_t), the martingale M = log rho_n + K, and v(s) the variance of a token's
   log-ratio given its history, Var(log rho_n) = sum_t E_b v(s_t) + Var(K) - 2 Cov(M, K). *)
Theorem claim_7_variance_decomposition n : Var b n [::] (path_sum l) =
  \sum_(t < n) E b t [::] token_variance + Var b n [::] (kappa_sum n) -
  2%:R * Cov b n [::] (fun w => path_sum l w + kappa_sum n w) (kappa_sum n).
Proof.
rewrite -Var_fluctuation; set M := fun w => _.
have eqM : Var b n [::] (path_sum fluctuation) = Var b n [::] M.
  by apply: eq_Var => u sz_u; rewrite (path_sum_fluctuation sz_u).
have eqN : Var b n [::] (kappa_sum n) = Var b n [::] (fun w => - kappa_sum n w).
  by rewrite /Var E_opp sqrrN; congr (_ - _); apply: eq_E => u _; rewrite sqrrN.
rewrite eqM eqN -mulrN -Cov_opp -Var_add.
by apply: eq_Var => u _; rewrite /M addrK.
Qed.

End Drift.

(* --- 7.third_policy ----------------------------------------------------------------------------------------------- *)

Section ThirdPolicy.

Variables (R : realFieldType) (A : finType) (mu : policy R A).
Implicit Types lmu lb lpi : seq A -> A -> R.

(* KL(mu||p) at a history, from log-probabilities lmu of mu and lp of p. *)
Definition divergence_from (lmu lp : seq A -> A -> R) s : R := next mu s (fun a => lmu s a - lp s a).

(* 7.third_policy: where mu writes the tokens, log (pi/b) drifts by KL(mu||b) - KL(mu||pi) a token, here for any
   functions lmu, lb, lpi in the place of the log-probabilities. *)
Theorem claim_7_third_policy_drift lmu lb lpi H t : (t <= H)%N ->
  E mu H [::] (fun w => path_sum (fun s a => lpi s a - lb s a) (take t w)) =
  \sum_(k < t) E mu H [::] (fun w => divergence_from lmu lb (take k w) - divergence_from lmu lpi (take k w)).
Proof.
move=> le_tH; rewrite claim_7_drift // -sumrN; apply: eq_bigr => k _; rewrite -E_opp; apply: eq_E => u _.
rewrite /kappa opprK /divergence_from /next -sumrB; apply: eq_bigr => a _.
by ring.
Qed.

End ThirdPolicy.

(* --- 7.power ------------------------------------------------------------------------------------------------------ *)

Section Powers.

Variable R : realFieldType.
Implicit Types (kappa eps x : R) (m n t : nat).

(* Linear drift passes a window eps sqrt(t) for good at t = (eps / kappa)^2: kappa t > eps sqrt(t) then and only then.
   Squares, so that no root is needed. *)
Theorem claim_7_power_sqrt kappa eps t : 0 < kappa -> (0 < t)%N ->
  (eps ^+ 2 * t%:R < (kappa * t%:R) ^+ 2) = ((eps / kappa) ^+ 2 < t%:R).
Proof.
move=> kappa_gt0 t_gt0; have tR_gt0 : 0 < t%:R :> R by rewrite ltr0n.
by rewrite exprMn [t%:R ^+ 2]expr2 mulrA ltr_pmul2r // mulrC expr_div_n ltr_pdivr_mulr ?exprn_gt0 //.
Qed.

(* The same for the power p = m/n < 1: (kappa t)^n > eps^n t^m, that is kappa t > eps t^p, for t > (eps / kappa)^n. *)
Theorem claim_7_power_rational kappa eps m n t : 0 < kappa -> (m < n)%N -> (0 < t)%N ->
  (eps / kappa) ^+ n < t%:R -> eps ^+ n * t%:R ^+ m < (kappa * t%:R) ^+ n.
Proof.
move=> kappa_gt0 lt_mn t_gt0 lt_t; have tR_gt0 : 0 < t%:R :> R by rewrite ltr0n.
rewrite exprMn -[in t%:R ^+ n](subnK (ltnW lt_mn)) exprD mulrA ltr_pmul2r ?exprn_gt0 //.
rewrite -ltr_pdivr_mull ?exprn_gt0 // mulrC -expr_div_n (lt_le_trans lt_t) //.
by rewrite -(subnSK lt_mn) exprS ler_pmulr // exprn_ege1 // ler1n.
Qed.

(* Sequences: what holds from some t on, limits, and c_t = o(t). *)
Definition eventually (P : nat -> Prop) := exists N, forall t, (N <= t)%N -> P t.
Definition tends_to (x : nat -> R) (limit : R) := forall eps, 0 < eps -> eventually (fun t => `|x t - limit| < eps).
Definition little_o (c : nat -> R) := forall delta, 0 < delta -> eventually (fun t => `|c t| <= delta * t%:R).

Lemma eventually_and P Q : eventually P -> eventually Q -> eventually (fun t => P t /\ Q t).
Proof.
move=> [N holds_P] [M holds_Q]; exists (maxn N M) => t; rewrite geq_max => /andP[le_Nt le_Mt].
by split; [apply: holds_P | apply: holds_Q].
Qed.

Lemma eventually_sub (P Q : nat -> Prop) : (forall t, P t -> Q t) -> eventually P -> eventually Q.
Proof. by move=> sub [N holds]; exists N => t /holds /sub. Qed.

End Powers.

Section Limits.

Variables (R : realFieldType) (A : finType) (b : policy R A) (S : nat -> seq A -> R) (kappa : R).
Implicit Type c : nat -> R.

(* S_t / t tends to - kappa in probability; S_t is any function of the first t tokens, such as log rho_t. *)
Definition drifts := forall delta, 0 < delta ->
  tends_to (fun t => Pr b t (fun w => delta * t%:R <= `|S t w + kappa * t%:R|)) 0.

Hypothesis kappa_gt0 : 0 < kappa.

Lemma outside c : little_o c -> eventually (fun t => forall w,
  S t w < - c t \/ kappa / 2%:R * t%:R <= `|S t w + kappa * t%:R|).
Proof.
move=> oc; have half_gt0 : 0 < kappa / 2%:R by rewrite divr_gt0 ?ltr0n.
apply: eventually_sub (oc _ half_gt0) => t small w.
have [lt | ge] := ltP (S t w) (- c t); [by left | right].
apply: le_trans (ler_norm _); rewrite -subr_ge0.
move: small; set h := kappa / 2%:R => small; have -> : kappa = h + h by rewrite -splitr.
have -> : S t w + (h + h) * t%:R - h * t%:R = (S t w - - c t) + (h * t%:R - c t) by ring.
by rewrite addr_ge0 // subr_ge0 // (le_trans (ler_norm _)).
Qed.

Lemma little_o_opp c : little_o c -> little_o (fun t => - c t).
Proof. by move=> oc delta /oc; apply: eventually_sub => t; rewrite normrN. Qed.

(* Where the low rate of every window o(t) tends to 1, its high rate tends to 0. *)
Lemma high_of_low : (forall c, little_o c -> tends_to (fun t => Pr b t (fun w => S t w < - c t)) 1) ->
  forall c, little_o c -> tends_to (fun t => Pr b t (fun w => c t < S t w)) 0.
Proof.
move=> low c /little_o_opp /low lim eps /lim; apply: eventually_sub => t; apply: le_lt_trans.
rewrite subr0 distrC ger0_norm ?Pr_ge0 // ger0_norm ?subr_ge0 ?Pr_le1 // -Pr_not; apply: Pr_le => u _.
by rewrite opprK -leNgt => /ltW.
Qed.

(* 7.power: if S_t / t (log rho_t / t) tends to - kappa < 0 in probability, every window c_t = o(t) around 0 is left
   downwards: P_b(S_t < - c_t) tends to 1 and P_b(S_t > c_t) to 0. At large t, S_t >= - c_t puts S_t at least
   (kappa/2) t away from - kappa t. *)
Theorem claim_7_power c : drifts -> little_o c ->
  tends_to (fun t => Pr b t (fun w => S t w < - c t)) 1 /\ tends_to (fun t => Pr b t (fun w => c t < S t w)) 0.
Proof.
move=> drift; have low c' : little_o c' -> tends_to (fun t => Pr b t (fun w => S t w < - c' t)) 1.
  move=> oc eps eps_gt0; have half_gt0 : 0 < kappa / 2%:R by rewrite divr_gt0 ?ltr0n.
  have := eventually_and (outside oc) (drift _ half_gt0 eps eps_gt0).
  apply: eventually_sub => t [out]; rewrite subr0; apply: le_lt_trans.
  rewrite distrC !ger0_norm ?subr_ge0 ?Pr_le1 ?Pr_ge0 // -Pr_not; apply: Pr_le => u _ /negP not_low.
  by case: (out u).
by move=> oc; split; [apply: low | apply: high_of_low].
Qed.

(* So no such window has a flat low rate, but for the rate 1, nor a flat high rate, but for the rate 0. *)
Theorem claim_7_power_no_flat_rate c r : drifts -> little_o c ->
  ((forall t, Pr b t (fun w => S t w < - c t) = r) -> r = 1) /\
  ((forall t, Pr b t (fun w => c t < S t w) = r) -> r = 0).
Proof.
have flat x limit : (forall t, x t = r) -> tends_to x limit -> r = limit.
  move=> eq_x lim; apply/eqP; rewrite -subr_eq0 -normr_eq0; apply: contraT => neq0.
  have [|N far] := lim `|r - limit|; first by rewrite lt_def neq0 normr_ge0.
  by have := far N (leqnn N); rewrite eq_x ltxx.
move=> drift oc; have [low high] := claim_7_power drift oc.
by split=> eq_r; apply: flat eq_r _.
Qed.

End Limits.

(* When is it so? Chebyshev's inequality. *)
Section Chebyshev.

Variables (R : realFieldType) (A : finType) (b : policy R A) (l : seq A -> A -> R) (k v : R).
Implicit Types (n t : nat) (c : R).

Hypothesis v_ge : forall s, reachable b s -> token_variance b l s <= v.

Lemma reachable_token_variance t : E b t [::] (token_variance b l) <= v.
Proof. by rewrite -(E_const b t [::] v); apply: E_le_reachable => u _; apply: v_ge. Qed.

Lemma fluctuation_square n : E b n [::] (fun w => path_sum (fluctuation b l) w ^+ 2) <= v * n%:R.
Proof.
have := Var_fluctuation b l n; rewrite /Var (E_score n (next_fluctuation b l)) expr0n subr0 => ->.
rewrite mulr_natr -[X in _ *+ X]card_ord -sumr_const; apply: ler_sum => t _; exact: reachable_token_variance.
Qed.

(* Where every token costs at least k on the average and its variance is at most v, at each history that b can reach
   (the drift may differ from one to the next, and from one sequence to the next), the share of the sequences that are
   still above - c after n tokens is at most v n / (k n - c)^2. *)
Theorem claim_7_power_bound n c : (forall s, reachable b s -> k <= kappa b l s) -> c < k * n%:R ->
  Pr b n (fun w => - c <= path_sum l w) <= v * n%:R / (k * n%:R - c) ^+ 2.
Proof.
move=> k_le lt_c; have gap_gt0 : 0 < k * n%:R - c by rewrite subr_gt0.
apply: le_trans (ler_wpmul2r _ (fluctuation_square n)); last by rewrite invr_ge0 exprn_ge0 // ltW.
apply: le_trans (markov_square _ _ _ gap_gt0); apply: E_le_reachable => u sz_u reach.
have [ge|] := boolP (- c <= _); last by rewrite ler0n.
suff -> : k * n%:R - c <= `|path_sum (fluctuation b l) u| by [].
apply: le_trans (ler_norm _); rewrite (path_sum_fluctuation b l sz_u) addrC; apply: ler_add => //.
rewrite mulr_natr -[X in _ *+ X]card_ord -sumr_const; apply: ler_sum => t _; apply: k_le; exact: reachable_take.
Qed.

(* Where the drift is the same k everywhere: P(|S_n + k n| >= d) <= v n / d^2. *)
Lemma constant_drift_bound n d : (forall s, reachable b s -> kappa b l s = k) -> 0 < d ->
  Pr b n (fun w => d <= `|path_sum l w + k * n%:R|) <= v * n%:R / d ^+ 2.
Proof.
move=> const d_gt0; apply: le_trans (ler_wpmul2r _ (fluctuation_square n)); last by rewrite invr_ge0 exprn_ge0 // ltW.
apply: le_trans (markov_square _ _ _ d_gt0); apply: E_le_reachable => u sz_u reach.
rewrite (path_sum_fluctuation b l sz_u) /kappa_sum (eq_bigr (fun=> k)) => [|t _]; last first.
  by apply: const; apply: reachable_take.
by rewrite sumr_const card_ord mulr_natr.
Qed.

End Chebyshev.

(* The limits, in a field where some integer exceeds every number. *)
Section Archimedean.

Variables (R : archiFieldType) (A : finType) (b : policy R A) (l : seq A -> A -> R) (k v : R).
Implicit Types (n m t : nat) (c : nat -> R).

Lemma eventually_above (x : R) : eventually (fun t => x < t%:R).
Proof.
exists (Num.bound `|x|) => t le_t; apply: le_lt_trans (ler_norm x) _.
by apply: lt_le_trans (archi_boundP (normr_ge0 x)) _; rewrite ler_nat.
Qed.

(* Every window of a power p = m/n < 1, with c_t^n = eps^n t^m, is o(t); so is every smaller one. *)
Theorem claim_7_power_window c eps m n : (m < n)%N -> (forall t, 0 <= c t) ->
  (forall t, c t ^+ n <= eps ^+ n * t%:R ^+ m) -> little_o c.
Proof.
move=> lt_mn c_ge0 c_le delta delta_gt0.
have := eventually_and (eventually_above ((eps / delta) ^+ n)) (eventually_above 0).
apply: eventually_sub => t [lt_t]; rewrite ltr0n => t_gt0; rewrite ger0_norm //.
have n_gt0 : (0 < n)%N by apply: leq_ltn_trans lt_mn.
rewrite -(ler_pexpn2r n_gt0) ?nnegrE ?mulr_ge0 ?ler0n ?(ltW delta_gt0) //.
by apply: le_trans (c_le t) _; rewrite ltW // claim_7_power_rational.
Qed.

Lemma vanishing (h eps : R) : 0 < h -> 0 < eps ->
  eventually (fun t => 0 < t%:R :> R /\ v * t%:R / (h * t%:R) ^+ 2 < eps).
Proof.
move=> h_gt0 eps_gt0; have h2_gt0 : 0 < h ^+ 2 by rewrite exprn_gt0.
apply: eventually_sub (eventually_and (eventually_above 0) (eventually_above (v / h ^+ 2 / eps))) => t [t_gt0 lt_t].
split=> //; rewrite exprMn [t%:R ^+ 2]expr2 mulrA -mulf_div divff ?gt_eqF // mulr1.
by move: lt_t; rewrite !ltr_pdivr_mulr ?mulr_gt0 //; congr (v < _); ring.
Qed.

Hypothesis v_ge : forall s, reachable b s -> token_variance b l s <= v.

(* 7.power without a limit among its premises: a drift of at least k > 0 and a variance of at most v for each token, at
   every history that b can reach, are enough. The sequences may diverge at different speeds. *)
Theorem claim_7_power_least_drift c : 0 < k -> (forall s, reachable b s -> k <= kappa b l s) -> little_o c ->
  tends_to (fun t => Pr b t (fun w => path_sum l w < - c t)) 1 /\
  tends_to (fun t => Pr b t (fun w => c t < path_sum l w)) 0.
Proof.
move=> k_gt0 k_le; pose S (t : nat) := path_sum l; have h_gt0 : 0 < k / 2%:R by rewrite divr_gt0 ?ltr0n.
have low c' : little_o c' -> tends_to (fun t => Pr b t (fun w => S t w < - c' t)) 1.
  move=> oc eps eps_gt0; apply: eventually_sub (eventually_and (oc _ h_gt0) (vanishing h_gt0 eps_gt0)) => t.
  move=> [le_c [t_gt0 lt_eps]]; rewrite distrC ger0_norm ?subr_ge0 ?Pr_le1 // -Pr_not.
  apply: le_lt_trans lt_eps; apply: (@le_trans _ _ (Pr b t (fun w => - (k / 2%:R * t%:R) <= path_sum l w))).
    apply: Pr_le => u _; rewrite -leNgt; apply: le_trans; rewrite ler_opp2.
    exact: le_trans (ler_norm _) le_c.
  have kh : k * t%:R - k / 2%:R * t%:R = k / 2%:R * t%:R by rewrite {1}(splitr k) mulrDl addrK.
  have := claim_7_power_bound (n := t) (c := k / 2%:R * t%:R) v_ge k_le; rewrite kh; apply.
  by rewrite -subr_gt0 kh mulr_gt0.
by move=> oc; split; [apply: low | apply: high_of_low].
Qed.

(* The premise of claim_7_power: with the same drift k at every history, log rho_t / t tends to - k in probability. *)
Theorem claim_7_power_constant_drift : (forall s, reachable b s -> kappa b l s = k) -> drifts b (fun=> path_sum l) k.
Proof.
move=> const delta delta_gt0 eps eps_gt0; apply: eventually_sub (vanishing delta_gt0 eps_gt0) => t [t_gt0].
rewrite subr0 ger0_norm ?Pr_ge0 //; apply: le_lt_trans.
by apply: constant_drift_bound; rewrite ?mulr_gt0.
Qed.

End Archimedean.

(* --- 7.crossover, 7.centered, 7.pi_mass --------------------------------------------------------------------------- *)

Section Rates.

Variables (R : realFieldType) (A : finType) (b pi : policy R A).
Implicit Types (X : seq A -> R) (c eps : R) (n t : nat).

(* With the drift sigma^2/2 of a Gaussian log rho_t, drift and window are equal at t = (2 eps / sigma^2)^2; the window
   is the number c >= 0 with c^2 = eps^2 t. *)
Theorem claim_7_crossover_time eps (sigma2 : R) c t : 0 < sigma2 -> (0 < t)%N -> 0 <= c -> c ^+ 2 = eps ^+ 2 * t%:R ->
  (c < sigma2 / 2%:R * t%:R) = ((2%:R * eps / sigma2) ^+ 2 < t%:R).
Proof.
move=> sigma2_gt0 t_gt0 c_ge0 c2; have kappa_gt0 : 0 < sigma2 / 2%:R by rewrite divr_gt0 ?ltr0n.
have -> : 2%:R * eps / sigma2 = eps / (sigma2 / 2%:R) by rewrite invf_div mulrCA mulrA.
rewrite -(@claim_7_power_sqrt _ (sigma2 / 2%:R)) // -c2.
by rewrite ltr_pexpn2r // nnegrE // pmulr_rge0 ?ler0n.
Qed.

(* 7.crossover: let - m be a median of log rho_t (of a Gaussian: its mean, m = kappa t). A window - c below which m has
   sunk leaves out at least half of the sequences; one below which it has not, at most half. *)
Theorem claim_7_crossover_half n X m c : Pr b n (fun w => X w < - m) <= 2%:R^-1 <= Pr b n (fun w => X w <= - m) ->
  (m <= c -> Pr b n (fun w => X w < - c) <= 2%:R^-1) /\ (c < m -> 2%:R^-1 <= Pr b n (fun w => X w < - c)).
Proof.
move=> /andP[lower upper]; split=> [le_mc | lt_cm].
  by apply: le_trans lower; apply: Pr_le => u _ lt; apply: lt_le_trans lt _; rewrite ler_opp2.
by apply: le_trans upper _; apply: Pr_le => u _ le; apply: le_lt_trans le _; rewrite ltr_opp2.
Qed.

(* A window centered on the drift, whatever the law of the log-ratio: of a variance of at most sigma^2 t no more than
   (sigma / eps)^2 lies at a distance of eps sqrt(t), at any t. *)
Theorem claim_7_centered_bound n X eps (sigma2 : R) c : 0 < c -> c ^+ 2 = eps ^+ 2 * n%:R ->
  Var b n [::] X <= sigma2 * n%:R -> Pr b n (fun w => c <= `|X w - E b n [::] X|) <= sigma2 / eps ^+ 2.
Proof.
move=> c_gt0 c2 var_le; apply: le_trans (chebyshev b n X c_gt0) _.
have := exprn_gt0 2 c_gt0; rewrite c2 => pos.
have n_neq0 : n%:R != 0 :> R by apply: contraTneq pos => ->; rewrite mulr0 ltxx.
have e_gt0 : 0 < eps ^+ 2 by rewrite lt_def sqr_ge0 andbT; apply: contraTneq pos => ->; rewrite mul0r ltxx.
by rewrite ler_pdivr_mulr // mulrA divfK ?gt_eqF.
Qed.

(* 7.pi_mass: what a window takes of the weights rho_n is the share of the strings that it clips under pi. *)
Theorem claim_7_pi_mass_share n (clipped : pred (seq A)) : absolutely_continuous b pi ->
  E b n [::] (fun w => rho b pi w * (clipped w)%:R) = Pr pi n clipped.
Proof. by move=> AC; rewrite E_rho_times. Qed.

End Rates.

(* Under pi the log-ratio rises: S_t / t tends to some kappa' > 0. Then every window o(t) takes, in the limit, all of
   the weight rho_t (the gradient mass of A > 0) at its upper end, while under b nobody is there. *)
Theorem claim_7_pi_mass_limit (R : realFieldType) (A : finType) (b pi : policy R A) (S : nat -> seq A -> R)
    (kappa kappa' : R) (c : nat -> R) :
  absolutely_continuous b pi -> 0 < kappa -> 0 < kappa' -> drifts b S kappa ->
  drifts pi (fun t w => - S t w) kappa' -> little_o c ->
  tends_to (fun t => E b t [::] (fun w => rho b pi w * (c t < S t w)%R%:R)) 1 /\
  tends_to (fun t => Pr b t (fun w => c t < S t w)) 0.
Proof.
move=> AC kappa_gt0 kappa'_gt0 fall rise oc; split; last by case: (claim_7_power kappa_gt0 fall oc).
have [high _] := claim_7_power kappa'_gt0 rise oc.
move=> eps /high; apply: eventually_sub => t; apply: le_lt_trans; rewrite (@claim_7_pi_mass_share _ _ _ _ t) //.
by rewrite le_eqVlt; apply/orP; left; apply/eqP; congr `|_ - _|; apply: eq_E => u _; rewrite ltr_opp2.
Qed.

(* --- 7.superlinear and the sign of 7.third_policy: coins whose ratios are powers of two --------------------------- *)

Section HotAndCold.

Variable R : realFieldType.

(* The first token, written with the same probabilities by both policies, decides whether the string is hot (b tosses a
   coin of 1/3, pi one of 2/3, for ever) or cold (both toss a fair one). *)
Definition third01 : 0 <= (1%:R / 3%:R : R) <= 1 := @fraction01 R 1 3 isT.
Definition two_thirds01 : 0 <= (2%:R / 3%:R : R) <= 1 := @fraction01 R 2 3 isT.
Definition hot_b := coins (hot_or_cold01 (half01 R) third01).
Definition hot_pi := coins (hot_or_cold01 (half01 R) two_thirds01).
Definition hot_log2 (s : seq bool) (a : bool) : int := if head false s then (if a then 1 else -1) else 0.

Let log2 s a : R := (hot_log2 s a)%:~R.

Lemma hot_ratio s a : ratio hot_b hot_pi s a = 2%:R ^ hot_log2 s a.
Proof.
by rewrite /ratio /hot_log2 /= /coin; case: s => [|[] s]; case: a; rewrite /= ?expr1z ?exprN1 ?expr0z; field.
Qed.

Lemma hot_mean n h s : E hot_b n (h :: s) (path_sum log2) = path_sum log2 (h :: s) - h%:R * n%:R / 3%:R.
Proof.
elim: n s => [|n IHn] s; first by rewrite mulr0 mul0r subr0.
rewrite /= big_bool !IHn -!rcons_cons !path_sum_rcons /log2 /hot_log2 /coin /=.
by case: h {IHn} => /=; rewrite -[n.+1]addn1 natrD ?mulr1z ?mulrN1z ?mulr0z; field.
Qed.

Lemma hot_square n h s : E hot_b n (h :: s) (fun w => path_sum log2 w ^+ 2) =
  (path_sum log2 (h :: s) - h%:R * n%:R / 3%:R) ^+ 2 + h%:R * 8%:R * n%:R / 9%:R.
Proof.
elim: n s => [|n IHn] s; first by rewrite /= !mulr0 !mul0r subr0 addr0.
rewrite /= big_bool !IHn -!rcons_cons !path_sum_rcons /log2 /hot_log2 /coin /=.
by case: h {IHn} => /=; rewrite -[n.+1]addn1 natrD ?mulr1z ?mulrN1z ?mulr0z; field.
Qed.

(* 7.superlinear: the variance of log2 rho after n more tokens is 4n/9 + n^2/36. It grows like n^2, and its root, the
   spread, like n: half of the sequences drift, and half do not. *)
Theorem claim_7_superlinear_every_n :
  (forall s a, ratio hot_b hot_pi s a = 2%:R ^ hot_log2 s a) /\
  forall n, Var hot_b n.+1 [::] (path_sum (fun s a => (hot_log2 s a)%:~R)) = 4%:R * n%:R / 9%:R + n%:R ^+ 2 / 36%:R.
Proof.
split=> [|n]; first exact: hot_ratio.
rewrite /Var /= !big_bool !hot_mean !hot_square /coin /=.
have zero a : path_sum log2 [:: a] = 0 by rewrite -[[:: a]]/(rcons [::] a) path_sum_rcons path_sum_nil addr0.
by rewrite !zero; field.
Qed.

(* 7.third_policy, the sign: b tosses a coin of 1/3 and pi one of 2/3, so that log2 of the ratio is 1 or -1. Where mu
   tosses a coin of m, the log-ratio of n tokens has mean (2 m - 1) n: it falls for m = 1/3 (mu = b), stays level at m
   = 1/2 and rises for m = 2/3 (mu = pi). *)
Theorem claim_7_third_policy_sign (m : R) (m01 : 0 <= m <= 1) :
  let b := coins (fun=> third01) in let pi := coins (fun=> two_thirds01) in let mu := coins (fun=> m01) in
  let log2 (a : bool) : int := if a then 1 else -1 in
  (forall s a, ratio b pi s a = 2%:R ^ log2 a) /\
  forall n, E mu n [::] (path_sum (fun s a => (log2 a)%:~R)) = (2%:R * m - 1) * n%:R.
Proof.
split=> [s a | n]; first by rewrite /ratio /= /coin; case: a; rewrite ?expr1z ?exprN1; field.
pose l (s : seq bool) (a : bool) : R := (if a then 1 else -1 : int)%:~R.
transitivity (path_sum l [::] + (2%:R * m - 1) * n%:R); last by rewrite path_sum_nil add0r.
elim: n [::] => [|n IHn] s; first by rewrite mulr0 addr0.
rewrite /= big_bool !IHn !path_sum_rcons /coin /l /= -[n.+1]addn1 natrD mulr1z mulrN1z.
by ring.
Qed.

End HotAndCold.

(* --- 13: a target that depends on a sample ------------------------------------------------------------------------ *)

Section Trained.

Variables (R : realFieldType) (A : finType) (b : policy R A).
Implicit Types (u w : seq A) (n t H : nat).

(* 13.independent: z is all that the updates have seen, drawn with probabilities q independently of the string w, and
   target z the policy that came out. Then the mean of rho_t is 1, over both draws ... *)
Theorem claim_13_independent (Z : finType) (q : Z -> R) (target : Z -> policy R A) H t :
  \sum_z q z = 1 -> (forall z, q z != 0 -> absolutely_continuous b (target z)) -> (t <= H)%N ->
  \sum_z q z * E b H [::] (fun w => rho b (target z) (take t w)) = 1.
Proof.
move=> q1 AC le_tH; rewrite -[RHS]q1; apply: eq_bigr => z _.
have [-> | q_neq0] := eqVneq (q z) 0; first by rewrite mul0r.
by rewrite (E_prefix b (rho b (target z)) le_tH) (E_rho (AC z q_neq0)) // rho_nil mulr1.
Qed.

(* ... and an importance-weighted mean of anything, a gradient at the target among them, is its mean over the target's
   own strings. *)
Theorem claim_13_independent_unbiased (Z : finType) (q : Z -> R) (target : Z -> policy R A) n (X : Z -> seq A -> R) :
  (forall z, q z != 0 -> absolutely_continuous b (target z)) ->
  \sum_z q z * E b n [::] (fun w => rho b (target z) w * X z w) = \sum_z q z * E (target z) n [::] (X z).
Proof.
move=> AC; apply: eq_bigr => z _; have [-> | q_neq0] := eqVneq (q z) 0; first by rewrite !mul0r.
by rewrite (E_rho_times (AC z q_neq0)).
Qed.

(* 13.own: the target is a function of the string itself. Then E rho adds up the probability of each string under the
   target that it leads to, and nothing makes that sum 1. *)
Theorem claim_13_own_mean (target : seq A -> policy R A) n :
  E b n [::] (fun w => rho b (target w) w) = \sum_(u : n.-tuple A | reachable b u) string_prob (target u) u.
Proof.
rewrite E_strings [RHS]big_mkcond; apply: eq_bigr => u _ /=.
case: ifP => [reach | /negbT/unreachable->]; last by rewrite mul0r.
by rewrite rho_string_prob // mulrC divfK // gt_eqF.
Qed.

(* An update that makes the string it was made from more likely, whichever it was, gives E rho > 1. *)
Theorem claim_13_own_above_1 (target : seq A -> policy R A) n :
  (forall u, size u = n -> reachable b u -> string_prob b u <= string_prob (target u) u) ->
  (exists u, [/\ size u = n, reachable b u & string_prob b u < string_prob (target u) u]) ->
  1 < E b n [::] (fun w => rho b (target w) w).
Proof.
move=> more [u0 [sz_u0 reach0 lt0]].
have one : \sum_(u : n.-tuple A | reachable b u) string_prob b u = 1.
  rewrite -(claim_13_own_mean (fun=> b)) -[RHS](E_const b n [::]).
  apply: eq_E_reachable => // u _ reach.
  by rewrite rho_string_prob // divff // gt_eqF.
rewrite claim_13_own_mean -one; have /eqP sz := sz_u0.
rewrite (bigD1 (Tuple sz)) //= [X in _ < X](bigD1 (Tuple sz)) //=; apply: ltr_le_add => //.
by apply: ler_sum => u /andP[reach _]; apply: more; rewrite ?size_tuple.
Qed.

(* 13.spread: where an update has moved all tokens of its string by the same amount X, log rho_n = n X has n^2 times the
   variance of a token; with the same token variance, a fresh string has n times that (the tokens' fluctuations do not
   covary, and its drift is the same everywhere). *)
Theorem claim_13_spread_own n (l : nat -> seq A -> R) (X : seq A -> R) :
  (forall t w, (t < n)%N -> size w = n -> reachable b w -> l t w = X w) ->
  Var b n [::] (fun w => \sum_(t < n) l t w) = n%:R ^+ 2 * Var b n [::] X.
Proof.
move=> same; have eqE m : E b n [::] (fun w => (\sum_(t < n) l t w) ^+ m) = n%:R ^+ m * E b n [::] (fun w => X w ^+ m).
  rewrite -E_scale; apply: eq_E_reachable => // u sz_u reach.
  rewrite -exprMn (eq_bigr (fun=> X u)) => [|t _]; first by rewrite sumr_const card_ord mulr_natl.
  exact: same.
have eqE1 : E b n [::] (fun w => \sum_(t < n) l t w) = n%:R * E b n [::] X by have := eqE 1%N; rewrite expr1.
by rewrite /Var eqE eqE1 exprMn mulrBr.
Qed.

Theorem claim_13_spread_fresh n (l : seq A -> A -> R) (kappa_at : nat -> R) v :
  (forall s, reachable b s -> kappa b l s = kappa_at (size s)) ->
  (forall t, (t < n)%N -> Var b n [::] (step l t) = v) ->
  Var b n [::] (path_sum l) = n%:R * v.
Proof.
move=> const same; rewrite (claim_7_variance_prefix_constant _ const) (eq_bigr (fun=> v)) => [|t _]; last exact: same.
by rewrite sumr_const card_ord mulr_natl.
Qed.

End Trained.
