(* Log-ratios and clip windows: the drift, the variance, and why a window c_t = o(t) around 0 cannot have a flat rate.

   A logarithm is not a rational function, and nothing here needs one: l s a is any function of history and token, to be
   read as log (pi(a|s) / b(a|s)), and path_sum l as log rho. What a theorem needs of the logarithm is among its
   premises: that log x <= x - 1 (Gibbs' inequality), or that 2^l is the ratio. A square root enters as a number c >= 0
   with c^2 = eps^2 t. "t large enough" needs that no number of the field exceeds all integers; theorems that say it
   are about any archiFieldType, as the rationals and the reals are, all others about any realFieldType. *)

From mathcomp Require Import all_ssreflect all_algebra ring.
From ctpo Require Import Trees Gradients.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(* --- covariances and probabilities ----------------------------------------------------------------------------------- *)

Section Moments.

Variables (R : realFieldType) (A : finType) (b : policy R A).
Implicit Types (s w u : seq A) (X Y Z : seq A -> R) (n t : nat).

(* The covariance, and the probability of an event, of strings of n tokens. *)
Definition Cov n X Y : R := E b n [::] (fun w => X w * Y w) - E b n [::] X * E b n [::] Y.
Definition Pr n (e : pred (seq A)) : R := E b n [::] (fun w => (e w)%:R).

Lemma eq_Cov n X Y Y' : (forall u, size u = n -> Y u = Y' u) -> Cov n X Y = Cov n X Y'.
Proof. by move=> eqY; rewrite /Cov; congr (_ - _ * _); apply: eq_E => u sz_u; rewrite eqY. Qed.

Lemma CovC n X Y : Cov n X Y = Cov n Y X.
Proof. by rewrite /Cov [X in _ - X]mulrC; congr (_ - _); apply: eq_E => u _; rewrite mulrC. Qed.

Lemma Cov_add n X Y Z : Cov n X (fun w => Y w + Z w) = Cov n X Y + Cov n X Z.
Proof.
have eqXYZ : E b n [::] (fun w => X w * (Y w + Z w)) = E b n [::] (fun w => X w * Y w + X w * Z w).
  by apply: eq_E => u _; rewrite mulrDr.
by rewrite /Cov eqXYZ !E_add; ring.
Qed.

Lemma Cov_opp n X Y : Cov n X (fun w => - Y w) = - Cov n X Y.
Proof.
have eqXY : E b n [::] (fun w => X w * - Y w) = E b n [::] (fun w => - (X w * Y w)).
  by apply: eq_E => u _; rewrite mulrN.
by rewrite /Cov eqXY !E_opp; ring.
Qed.

Lemma Cov_sum n X (Y : nat -> seq A -> R) m :
  Cov n X (fun w => \sum_(k < m) Y k w) = \sum_(k < m) Cov n X (Y k).
Proof.
elim: m => [|m IHm].
  have eq0 : E b n [::] (fun w => X w * \sum_(k < 0) Y k w) = 0.
    by rewrite -[RHS](E0 b n [::]); apply: eq_E => u _; rewrite big_ord0 mulr0.
  by rewrite big_ord0 /Cov eq0 E_sum big_ord0 mulr0 subrr.
rewrite big_ord_recr /= -IHm -Cov_add.
by apply: eq_Cov => u _; rewrite big_ord_recr.
Qed.

Lemma Var_add n X Y : Var b n [::] (fun w => X w + Y w) = Var b n [::] X + Var b n [::] Y + 2%:R * Cov n X Y.
Proof.
have eqXY : E b n [::] (fun w => (X w + Y w) ^+ 2) =
    E b n [::] (fun w => X w ^+ 2 + 2%:R * (X w * Y w) + Y w ^+ 2).
  by apply: eq_E => u _; rewrite sqrrD -mulr_natl.
rewrite /Var eqXY !E_add E_scale /Cov; move: (E b n [::] (fun w => X w * Y w)) (E b n [::] X) (E b n [::] Y).
by move: (E b n [::] _) (E b n [::] _) => x2 y2 xy x y; ring.
Qed.

(* The variance of a sum: the variances, and twice the covariances. *)
Lemma Var_sum n (X : nat -> seq A -> R) m : Var b n [::] (fun w => \sum_(t < m) X t w) =
  \sum_(t < m) Var b n [::] (X t) + 2%:R * \sum_(t < m) \sum_(k < t) Cov n (X k) (X t).
Proof.
elim: m => [|m IHm].
  have eq0 : E b n [::] (fun w => (\sum_(t < 0) X t w) ^+ 2) = 0.
    by rewrite -[RHS](E0 b n [::]); apply: eq_E => u _; rewrite big_ord0 expr0n.
  by rewrite !big_ord0 mulr0 addr0 /Var eq0 E_sum big_ord0 expr0n subrr.
have -> : Var b n [::] (fun w => \sum_(t < m.+1) X t w) = Var b n [::] (fun w => \sum_(t < m) X t w + X m w).
  by rewrite /Var; congr (_ - _ ^+ _); apply: eq_E => u _; rewrite big_ord_recr.
have cov_m : Cov n (fun w => \sum_(t < m) X t w) (X m) = \sum_(k < m) Cov n (X k) (X m).
  by rewrite CovC Cov_sum; apply: eq_bigr => k _; rewrite CovC.
by rewrite Var_add IHm cov_m !big_ord_recr /= mulrDr [RHS]addrA; congr (_ + _); rewrite addrAC.
Qed.

(* Only strings that b can write count. *)
Lemma E_le_reachable n X Y : (forall u, size u = n -> reachable b u -> X u <= Y u) -> E b n [::] X <= E b n [::] Y.
Proof.
move=> leXY; pose Z w := if (size w == n) && reachable b w then X w else Y w.
rewrite (@eq_E_reachable _ _ b n [::] X Z) ?reachable_nil // => [|u sz_u reach].
  by apply: E_le => w; rewrite /Z; case: ifP => // /andP[/eqP sz_w reach]; apply: leXY.
by rewrite /Z /= sz_u eqxx reach.
Qed.

Lemma reachable_take t w : reachable b w -> reachable b (take t w).
Proof.
elim/last_ind: w => [|w a IHw] //; rewrite reachable_rcons => /andP[reach a_gt0].
case: (leqP t (size w)) => [le_tw | lt_wt]; first by rewrite -cats1 takel_cat // IHw.
by rewrite take_oversize ?size_rcons // reachable_rcons reach.
Qed.

Lemma Pr_ge0 n e : 0 <= Pr n e.
Proof. by apply: E_ge0 => w; rewrite ler0n. Qed.

Lemma Pr_le n (e f : pred (seq A)) : (forall u, size u = n -> e u -> f u) -> Pr n e <= Pr n f.
Proof.
move=> sub; apply: E_le_reachable => u sz_u _.
by case e_u: (e u); rewrite ?ler0n // sub.
Qed.

Lemma Pr_not n e : Pr n (fun w => ~~ e w) = 1 - Pr n e.
Proof.
rewrite -(E_const b n [::] 1) /Pr -E_sub.
by apply: eq_E => u _; case: (e u); rewrite ?subrr ?subr0.
Qed.

Lemma Pr_le1 n e : Pr n e <= 1.
Proof. by rewrite -subr_ge0 -Pr_not Pr_ge0. Qed.

(* Markov's inequality for a square, from which Chebyshev's. *)
Lemma markov_square n X c : 0 < c -> Pr n (fun w => c <= `|X w|) <= E b n [::] (fun w => X w ^+ 2) / c ^+ 2.
Proof.
move=> c_gt0; have c2_gt0 : 0 < c ^+ 2 by rewrite exprn_gt0.
rewrite ler_pdivl_mulr // mulrC -E_scale; apply: E_le => w.
have [le_c|_] := boolP (c <= `|X w|); last by rewrite mulr0 sqr_ge0.
by rewrite mulr1 -[X w ^+ 2]real_normK ?num_real // ler_expn2r ?nnegrE ?(ltW c_gt0).
Qed.

Lemma chebyshev n X c : 0 < c -> Pr n (fun w => c <= `|X w - E b n [::] X|) <= Var b n [::] X / c ^+ 2.
Proof. by move=> c_gt0; rewrite Var_centered; apply: markov_square. Qed.

(* The expectation of a token, given what came before. *)
Lemma E_next n s f : E b n.+1 s (step f (size s)) = next b s (f s).
Proof.
rewrite /=; apply: eq_bigr => a _; congr (_ * _).
rewrite -[RHS](E_past b n (rcons s a) (fun=> f s a)); apply: eq_E => u _.
by rewrite step_cat ?size_rcons // step_rcons.
Qed.

Lemma E_known_step H t (Y : seq A -> R) f : (t < H)%N ->
  E b H [::] (fun w => Y (take t w) * step f t w) = E b t [::] (fun s => Y s * next b s (f s)).
Proof.
move=> lt_tH; rewrite (E_split _ _ (ltnW lt_tH)); apply: eq_E => s /= sz_s.
by rewrite -sz_s E_known -(@prednK (H - _)) ?E_next // subn_gt0 sz_s.
Qed.

Lemma E_step H t f : (t < H)%N -> E b H [::] (step f t) = E b t [::] (fun s => next b s (f s)).
Proof.
move=> lt_tH; have := E_known_step (fun=> 1) f lt_tH.
rewrite (@eq_E _ _ b H [::] _ (step f t)) => [->|u _]; last by rewrite mul1r.
by apply: eq_E => u _; rewrite mul1r.
Qed.

End Moments.

(* --- 7.drift and 7.variance ------------------------------------------------------------------------------------------ *)

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
Proof.
move=> lt_tw; rewrite /step; case def_w: (drop t w) => [|a v] //.
by move: lt_tw; rewrite -subn_gt0 -size_drop def_w.
Qed.

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
  have a_gt0 : 0 < b s a by rewrite lt_def a_neq0 prob_ge0.
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
  have a_gt0 : 0 < b s a by rewrite lt_def a_neq0 prob_ge0.
  apply: le_trans (ler_wpmul2l (ltW a_gt0) (gibbs a a_gt0)) _.
  by rewrite mulrBr mulr1 /ratio mulrC divfK.
have sum_gap : \sum_a gap a = - next b s (l s) by rewrite !sumrB !prob_sum1 subrr sub0r.
rewrite -oppr_gt0 -sum_gap lt_def sumr_ge0 ?andbT //; apply/negP.
rewrite psumr_eq0 // => /allP gap0; have := gap0 a1 (mem_index_enum _); rewrite /= subr_eq0.
have [b0 | b_neq0] := eqVneq (b s a1) 0; first by rewrite b0 mul0r subr0 -b0 (negbTE neq1).
have b_gt0 : 0 < b s a1 by rewrite lt_def b_neq0 prob_ge0.
have -> : pi s a1 - b s a1 = b s a1 * (ratio b pi s a1 - 1) by rewrite mulrBr mulr1 /ratio mulrC divfK.
rewrite (inj_eq (mulfI b_neq0)) eq_sym (gibbs a1 b_gt0) /ratio -[X in _ == X](divff b_neq0).
by rewrite (inj_eq (divIf b_neq0)) (negbTE neq1).
Qed.

(* What is known before a token does not covary with its fluctuation. *)
Lemma Cov_fluctuation H t (Y : seq A -> R) : (t < H)%N -> (forall w, Y (take t w) = Y w) ->
  Cov b H Y (step fluctuation t) = 0.
Proof.
move=> lt_tH known; rewrite /Cov E_step // (@eq_E _ _ b t [::] _ (fun=> 0)) => [|u _]; last exact: next_fluctuation.
rewrite E0 mulr0 subr0.
rewrite (@eq_E _ _ b H [::] _ (fun w => Y (take t w) * step fluctuation t w)) => [|u _]; last by rewrite known.
rewrite E_known_step // -[RHS](E0 b t [::]).
by apply: eq_E => u _; rewrite next_fluctuation mulr0.
Qed.

(* Cov(l_k, l_t) = - Cov(l_k, kappa(s_t)) for tokens k < t: tokens covary only through the divergence that they lead to. *)
Theorem claim_7_variance_covariance H k t : (k < t)%N -> (t < H)%N ->
  Cov b H (step l k) (step l t) = - Cov b H (step l k) (fun w => kappa (take t w)).
Proof.
move=> lt_kt lt_tH; apply/eqP; rewrite -subr_eq0 opprK -Cov_add.
rewrite -(@Cov_fluctuation H t (step l k)) // => [|w]; last exact: step_take.
by apply/eqP/eq_Cov => u sz_u; rewrite step_fluctuation // sz_u.
Qed.

Lemma path_sum_all n w : size w = n -> path_sum l w = \sum_(t < n) step l t w.
Proof. by move=> <-. Qed.

(* Var(log rho_n) = sum_t Var(log r_t) - 2 sum_{k<t} Cov(log r_k, kappa(s_t)). *)
Theorem claim_7_variance_sum n : Var b n [::] (path_sum l) =
  \sum_(t < n) Var b n [::] (step l t) -
  2%:R * \sum_(t < n) \sum_(k < t) Cov b n (step l k) (fun w => kappa (take t w)).
Proof.
transitivity (Var b n [::] (fun w => \sum_(t < n) step l t w)).
  by rewrite /Var; congr (_ - _ ^+ _); apply: eq_E => u sz_u; rewrite (path_sum_all sz_u).
rewrite Var_sum -mulrN -sumrN; congr (_ + _ * _); apply: eq_bigr => t _.
rewrite -sumrN; apply: eq_bigr => k _.
by rewrite claim_7_variance_covariance.
Qed.

(* 7.variance: the variance of log rho_n is the sum of the variances of its tokens' if and only if the covariances of
   log r_k with the later divergence kappa(s_t) add up to 0. *)
Theorem claim_7_variance_criterion n :
  Var b n [::] (path_sum l) = \sum_(t < n) Var b n [::] (step l t) <->
  \sum_(t < n) \sum_(k < t) Cov b n (step l k) (fun w => kappa (take t w)) = 0.
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
  apply: eq_E_reachable => [|u sz_u reach]; first exact: reachable_nil.
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
  by rewrite /Var; congr (_ - _ ^+ _); apply: eq_E => u sz_u; rewrite -sz_u.
rewrite Var_sum [X in _ * X]big1 => [|t _]; last first.
  by apply: big1 => k _; apply: Cov_fluctuation => // w; apply: step_take.
rewrite mulr0 addr0; apply: eq_bigr => t _; rewrite /Var E_step // (@eq_E _ _ b t [::] _ (fun=> 0)) => [|u _].
  rewrite E0 expr0n subr0 -(@E_step _ _ b n t (fun s a => fluctuation s a ^+ 2)) //.
  by apply: eq_E => u _; rewrite /step; case: drop => //=; rewrite expr0n.
exact: next_fluctuation.
Qed.

(* The whole of it: with K = sum_t kappa(s_t), the martingale M = log rho_n + K, and v(s) the variance of a token's
   log-ratio given its history, Var(log rho_n) = sum_t E_b v(s_t) + Var(K) - 2 Cov(M, K). *)
Theorem claim_7_variance_decomposition n : Var b n [::] (path_sum l) =
  \sum_(t < n) E b t [::] token_variance + Var b n [::] (kappa_sum n) -
  2%:R * Cov b n (fun w => path_sum l w + kappa_sum n w) (kappa_sum n).
Proof.
rewrite -Var_fluctuation; set M := fun w => _.
have eqM : Var b n [::] (path_sum fluctuation) = Var b n [::] M.
  by rewrite /Var; congr (_ - _ ^+ _); apply: eq_E => u sz_u; rewrite (path_sum_fluctuation sz_u).
have eqN : Var b n [::] (kappa_sum n) = Var b n [::] (fun w => - kappa_sum n w).
  by rewrite /Var E_opp sqrrN; congr (_ - _); apply: eq_E => u _; rewrite sqrrN.
rewrite eqM eqN -mulrN -Cov_opp -Var_add /Var.
by congr (_ - _ ^+ _); apply: eq_E => u _; rewrite /M addrK.
Qed.

End Drift.
