(* Second moments of the cumulative ratio: how they compound, when the product formula holds, and by how much the ratio of
   the whole string is noisier than that of its first t tokens; the ratios of single tokens are uncorrelated in any case.
   Then a third policy between the sampler and the target: which weights correct for it, and what a cap takes away.

   The second moment is compounded by the divergence chi2 averaged under b tilted by rho^2. The product formula averages
   it under b, which is the same thing only if rho^2 and chi2 are uncorrelated. *)

From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp Require Import ring.
From ctpo Require Import Trees.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(* --- expectations, token by token ------------------------------------------------------------------------------------ *)

Section Tokens.

Variables (R : realFieldType) (A : finType) (p : policy R A).
Implicit Types (s w : seq A) (X Y : seq A -> R).

Definition Cov n s X Y := E p n s (fun w => X w * Y w) - E p n s X * E p n s Y.

Lemma E_last n s X : E p n.+1 s X = E p n s (fun u => next p u (fun a => X (rcons u a))).
Proof. by rewrite -addn1 E_tower. Qed.

(* A function of the history of token k + 1 and of f at that token. *)
Lemma E_step H k (f : seq A -> A -> R) (G : seq A -> R -> R) : (k < H)%N ->
  E p H [::] (fun w => G (take k w) (step f k w)) = E p k [::] (fun s => next p s (fun a => G s (f s a))).
Proof.
move=> lt_kH; transitivity (E p k.+1 [::] (fun w => G (take k w) (step f k w))).
  rewrite -(E_prefix p (fun w => G (take k w) (step f k w)) lt_kH).
  by apply: eq_E => u _; rewrite take_take ?leqnSn // step_take.
rewrite E_last; apply: eq_E => s /= sz_s; apply: eq_bigr => a _.
by rewrite -sz_s step_rcons -cats1 take_size_cat.
Qed.

Lemma next_const s c : next p s (fun=> c) = c.
Proof. by rewrite /next -big_distrl /= prob_sum1 mul1r. Qed.

Lemma next_scale s c (f : A -> R) : next p s (fun a => c * f a) = c * next p s f.
Proof. by rewrite /next big_distrr /=; apply: eq_bigr => a _; rewrite mulrCA. Qed.

End Tokens.

(* --- chapter 2: how the second moment compounds ---------------------------------------------------------------------- *)

Section SecondMoments.

Variables (R : realFieldType) (A : finType) (b pi : policy R A).
Implicit Types (s w : seq A).
Local Notation rho := (rho b pi).
Local Notation ratio := (ratio b pi).
Local Notation chi2 := (chi2 b pi).

(* E_b rho_t^2, and the divergence of token t + 1: averaged under b, and under b tilted by rho_t^2. *)
Definition second_moment t : R := E b t [::] (fun s => rho s ^+ 2).
Definition chi2_marginal t : R := E b t [::] chi2.
Definition chi2_tilted t : R := E b t [::] (fun s => rho s ^+ 2 * chi2 s) / second_moment t.

Lemma next_ratio_sqr s : next b s (fun a => ratio s a ^+ 2) = 1 + chi2 s.
Proof.
rewrite addrC subrK; apply: eq_bigr => a _; rewrite /Trees.ratio.
have [-> | a_neq0] := eqVneq (b s a) 0; first by rewrite mul0r invr0 mulr0.
by field.
Qed.

Lemma second_moment0 : second_moment 0 = 1.
Proof. by rewrite /second_moment /= rho_nil expr1n. Qed.

(* What a token adds to the second moment. *)
Theorem claim_2_recursion_increment t :
  second_moment t.+1 = second_moment t + E b t [::] (fun s => rho s ^+ 2 * chi2 s).
Proof.
rewrite /second_moment E_last -E_add; apply: eq_E => s _ /=.
rewrite -{1}[rho s ^+ 2]mulr1 -mulrDr -next_ratio_sqr -next_scale.
by apply: eq_bigr => a _; rewrite rho_rcons exprMn.
Qed.

(* Where chi2 = c at every history to come, tokens multiply the second moment by 1 + c. *)
Lemma second_moment_from n s c :
  (forall u, chi2 (s ++ u) = c) -> E b n s (fun w => rho w ^+ 2) = rho s ^+ 2 * (1 + c) ^+ n.
Proof.
elim: n s => [|n IHn] s chi2c /=; first by rewrite mulr1.
transitivity (next b s (fun a => (rho s ^+ 2 * (1 + c) ^+ n) * ratio s a ^+ 2)).
  apply: eq_bigr => a _; rewrite IHn => [|u]; last by rewrite cat_rcons.
  by rewrite rho_rcons exprMn; ring.
by rewrite next_scale next_ratio_sqr -[s in chi2 s]cats0 chi2c -mulrA -exprSr.
Qed.

Section Correct.

Hypothesis AC : absolutely_continuous b pi.

Lemma E_rho t : E b t [::] rho = 1.
Proof.
transitivity (E b t [::] (fun w => rho w * 1)); first by apply: eq_E => u _; rewrite mulr1.
by rewrite (change_of_measure AC) ?reachable_nil // E_const rho_nil mulr1.
Qed.

Lemma Var_rho H t : (t <= H)%N -> Var b H [::] (fun w => rho (take t w)) = second_moment t - 1.
Proof.
by move=> le_tH; rewrite /Var (E_prefix b (fun s => rho s ^+ 2)) // (E_prefix b rho) // E_rho expr1n.
Qed.

Lemma second_moment_ge1 t : 1 <= second_moment t.
Proof. by rewrite -subr_ge0 -(Var_rho (leqnn t)) Var_ge0. Qed.

Lemma second_moment_neq0 t : second_moment t != 0.
Proof. by rewrite gt_eqF // (lt_le_trans ltr01) // second_moment_ge1. Qed.

(* m_{t+1} = m_t (1 + tilted chi2 of token t + 1), for m_t = E_b rho_t^2, whatever the tokens depend on. *)
Theorem claim_2_recursion_step t : second_moment t.+1 = second_moment t * (1 + chi2_tilted t).
Proof. by rewrite claim_2_recursion_increment mulrDr mulr1 mulrC divfK ?second_moment_neq0 // addrC. Qed.

(* So a product formula always holds, with tilted divergences: E_b rho_t^2 = prod_{k<t} (1 + tilted chi2_k). *)
Theorem claim_2_recursion H t : (t <= H)%N ->
  E b H [::] (fun w => rho (take t w) ^+ 2) = \prod_(k < t) (1 + chi2_tilted k).
Proof.
move=> le_tH; rewrite (E_prefix b (fun s => rho s ^+ 2)) // -/(second_moment t).
elim: t {le_tH} => [|t IHt]; first by rewrite second_moment0 big_ord0.
by rewrite claim_2_recursion_step IHt big_ord_recr.
Qed.

Lemma E_ratio_sqr H k : (k < H)%N -> E b H [::] (fun w => step ratio k w ^+ 2) = 1 + chi2_marginal k.
Proof.
move=> lt_kH; rewrite (E_step b ratio (fun _ x => x ^+ 2)) // -{1}(E_const b k [::] 1) -E_add.
by apply: eq_E => s _; apply: next_ratio_sqr.
Qed.

(* What is known before token k + 1 has the same mean with its ratio as without. *)
Lemma E_known_ratio H k (Y : seq A -> R) : (k < H)%N ->
  E b H [::] (fun w => Y (take k w) * step ratio k w) = E b k [::] Y.
Proof.
move=> lt_kH; rewrite (E_step b ratio (fun s x => Y s * x)) //.
apply: eq_E_reachable; rewrite ?reachable_nil // => s _ reach.
rewrite next_scale -[RHS]mulr1; congr (_ * _); rewrite -(next_const pi s 1) -(next_ratio AC _ reach).
by apply: eq_bigr => a _; rewrite mulr1.
Qed.

Lemma E_ratio H k : (k < H)%N -> E b H [::] (step ratio k) = 1.
Proof.
move=> lt_kH; rewrite -(E_const b k [::] 1) -(E_known_ratio _ lt_kH).
by apply: eq_E => w _; rewrite mul1r.
Qed.

(* The chi2 of a token averaged under b is the variance of that token's ratio. *)
Theorem claim_2_product_marginal H k : (k < H)%N -> Var b H [::] (step ratio k) = chi2_marginal k.
Proof. by move=> lt_kH; rewrite /Var E_ratio_sqr // E_ratio // expr1n addrC addKr. Qed.

(* The ratios of two tokens are uncorrelated, always: the earlier one is known when the later one, whose mean is 1 at
   every history, is drawn. So a correlation of 0 says nothing about the product formula. *)
Theorem claim_2_uncorrelated H j k : (j < H)%N -> (k < H)%N -> j != k ->
  Cov b H [::] (step ratio j) (step ratio k) = 0.
Proof.
wlog lt_jk : j k / (j < k)%N => [cov0 | lt_jH lt_kH _].
  move=> lt_jH lt_kH; rewrite neq_ltn => /orP[lt_jk | lt_kj]; first by apply: cov0; rewrite // ltn_eqF.
  rewrite -(cov0 k j) ?ltn_eqF // /Cov [X in _ = _ - X]mulrC; congr (_ - _).
  by apply: eq_E => w _; rewrite mulrC.
rewrite /Cov !E_ratio // mulr1 -(E_ratio lt_jk) -(E_known_ratio _ lt_kH); apply/eqP; rewrite subr_eq0; apply/eqP.
by apply: eq_E => w _; rewrite step_take.
Qed.

(* When the product formula holds: up to token T it does if and only if rho_k^2 and the divergence of the token after are
   uncorrelated for all k < T. One step of the recursion at a time. *)
Theorem claim_2_product_iff T :
  (forall t, (t <= T)%N -> Var b T [::] (fun w => rho (take t w)) = \prod_(k < t) (1 + chi2_marginal k) - 1) <->
  (forall k, (k < T)%N -> Cov b k [::] (fun s => rho s ^+ 2) chi2 = 0).
Proof.
have -> : (forall t, (t <= T)%N -> Var b T [::] (fun w => rho (take t w)) = \prod_(k < t) (1 + chi2_marginal k) - 1) <->
          (forall t, (t <= T)%N -> second_moment t = \prod_(k < t) (1 + chi2_marginal k)).
  split=> formula t le_tT; first by apply: (addIr (- 1)); rewrite -formula // Var_rho.
  by rewrite Var_rho // formula.
have covE k : Cov b k [::] (fun s => rho s ^+ 2) chi2 =
    second_moment k.+1 - second_moment k * (1 + chi2_marginal k).
  by rewrite claim_2_recursion_increment /Cov -/(second_moment k) -/(chi2_marginal k); ring.
split=> [formula k lt_kT | cov0 t].
  by rewrite covE !formula ?(ltnW lt_kT) // big_ord_recr subrr.
elim: t => [_|t IHt lt_tT]; first by rewrite second_moment0 big_ord0.
rewrite big_ord_recr -IHt ?(ltnW lt_tT) //.
by apply/eqP; rewrite -subr_eq0 -covE cov0.
Qed.

(* Prop 2(ii): the product formula holds if chi2 is the same after all histories of a length that b can write. Tokens may
   well depend on the history. *)
Theorem claim_2_product H t : (t <= H)%N ->
  (forall s s', reachable b s -> reachable b s' -> size s = size s' -> chi2 s = chi2 s') ->
  Var b H [::] (fun w => rho (take t w)) = \prod_(k < t) (1 + chi2_marginal k) - 1.
Proof.
move=> le_tH same; rewrite Var_rho // -(Var_rho (leqnn t)).
apply: (claim_2_product_iff t).2 => // k _; rewrite /Cov mulrC -E_scale.
apply/eqP; rewrite subr_eq0; apply/eqP; apply: eq_E_reachable; rewrite ?reachable_nil // => s sz_s reach.
rewrite mulrC; congr (_ * _); rewrite -[LHS](E_const b k [::]).
by apply: eq_E_reachable; rewrite ?reachable_nil // => s' sz_s' reach'; apply: same; rewrite ?sz_s ?sz_s'.
Qed.

(* It is enough that chi2 = c_k after the histories of k tokens that pi can write: no others have any weight. *)
Theorem claim_2_product_reachable H t (c : nat -> R) : (t <= H)%N ->
  (forall s, reachable pi s -> chi2 s = c (size s)) ->
  Var b H [::] (fun w => rho (take t w)) = \prod_(k < t) (1 + c k) - 1.
Proof.
move=> le_tH chi2c; rewrite Var_rho //; congr (_ - 1).
elim: t {le_tH} => [|t IHt]; first by rewrite second_moment0 big_ord0.
rewrite claim_2_recursion_increment big_ord_recr -IHt /= mulrDr mulr1 [_ * c t]mulrC -E_scale.
congr (_ + _); apply: eq_E_reachable; rewrite ?reachable_nil // => s sz_s reach.
have [reach_pi | ] := boolP (reachable pi s); first by rewrite mulrC chi2c ?sz_s.
rewrite /reachable -leNgt => prob_le0; rewrite (rho_string_prob pi reach).
have /eqP -> : string_prob pi s == 0 by rewrite eq_le prob_le0 string_prob_ge0.
by rewrite !mul0r expr0n mulr0 mul0r.
Qed.

(* The ratios of the tokens are independent: the mean of a product of functions of one ratio each is the product of
   their means. Then the product formula holds, as rho_t^2 is such a product. *)
Definition independent_ratios H := forall phi : nat -> R -> R,
  E b H [::] (fun w => \prod_(k < H) phi k (step ratio k w)) = \prod_(k < H) E b H [::] (fun w => phi k (step ratio k w)).

Theorem claim_2_product_independent H t : (t <= H)%N -> independent_ratios H ->
  Var b H [::] (fun w => rho (take t w)) = \prod_(k < t) (1 + chi2_marginal k) - 1.
Proof.
move=> le_tH indep; rewrite Var_rho //; congr (_ - 1).
rewrite /second_moment -(E_prefix b (fun s => rho s ^+ 2) le_tH).
transitivity (E b H [::] (fun w => \prod_(k < H) (if (k < t)%N then step ratio k w ^+ 2 else 1))).
  apply: eq_E => w sz_w; rewrite -big_mkcond -(big_ord_widen _ (fun k => step ratio k w ^+ 2)) // prodrXl.
  by congr (_ ^+ 2); apply: path_prod_take; rewrite sz_w.
rewrite (indep (fun k x => if (k < t)%N then x ^+ 2 else 1)) (big_ord_widen _ (fun k => 1 + chi2_marginal k) le_tH).
rewrite [RHS]big_mkcond; apply: eq_bigr => k _; case: ifP => _; last exact: E_const.
exact: E_ratio_sqr.
Qed.

End Correct.

(* Policies that look at the number of tokens written only have independent ratios. *)
Lemma independent_prefix_free H :
  (forall s s' a, size s = size s' -> b s a = b s' a /\ pi s a = pi s' a) -> independent_ratios H.
Proof.
move=> free phi; elim: H => [|H IHH]; first by rewrite !big_ord0 /= big_ord0.
set X := fun w => \prod_(k < H) phi k (step ratio k w).
transitivity (E b H.+1 [::] (fun w => X (take H w) * phi H (step ratio H w))).
  apply: eq_E => w _; rewrite big_ord_recr; congr (_ * _).
  by apply: eq_bigr => k _; rewrite step_take.
rewrite big_ord_recr (E_step b ratio (fun s x => X s * phi H x)) // (E_step b ratio (fun _ x => phi H x)) //.
set c := E b H [::] (fun s => next b s (fun a => phi H (ratio s a))).
transitivity (E b H [::] (fun s => c * X s)).
  apply: eq_E => s /= sz_s; rewrite next_scale mulrC; congr (_ * _); rewrite -[LHS](E_const b H [::]).
  apply: eq_E => s' /= sz_s'; apply: eq_bigr => a _.
  by have [eq_b eq_pi] := free s s' a (etrans sz_s (esym sz_s')); rewrite /Trees.ratio eq_b eq_pi.
rewrite E_scale mulrC IHH; congr (_ * _); apply: eq_bigr => k _.
by rewrite !(E_step b ratio (fun _ x => phi k x)) // ltnS ltnW.
Qed.

(* The dynamic program, for policies that see the history through a state: the second moment is the mass of a measure on
   the states that a token moves on with the weights pi^2/b. *)
Section States.

Variables (S : finType) (start : S) (next_state : S -> A -> S) (behavior target : S -> A -> R).
Implicit Types x y : S.

Definition state s := foldl next_state start s.

Definition squared_weight x y : R := \sum_(a : A | next_state x a == y) target x a ^+ 2 / behavior x a.

Fixpoint squared_mass t y : R :=
  if t is t'.+1 then \sum_(x : S) squared_mass t' x * squared_weight x y else (y == start)%:R.

Theorem claim_2_recursion_states t :
  (forall s a, b s a = behavior (state s) a) -> (forall s a, pi s a = target (state s) a) ->
  second_moment t = \sum_(x : S) squared_mass t x.
Proof.
move=> bE piE; pose on y w : R := (state w == y)%:R * rho w ^+ 2.
have pick (F : S -> R) x : \sum_(y : S) (x == y)%:R * F y = F x.
  rewrite (bigD1 x) //= eqxx mul1r big1 ?addr0 // => y /negbTE neq_yx.
  by rewrite eq_sym neq_yx mul0r.
have on_next y w : next b w (fun a => on y (rcons w a)) = \sum_(x : S) squared_weight x y * on x w.
  transitivity (\sum_(x : S) (state w == x)%:R * (rho w ^+ 2 * squared_weight x y)); last first.
    by apply: eq_bigr => x _; rewrite /on mulrA mulrC.
  rewrite (pick (fun x => rho w ^+ 2 * squared_weight x y)) big_distrr [RHS]big_mkcond /=.
  apply: eq_bigr => a _; rewrite /on /state foldl_rcons -/(state w) rho_rcons exprMn /Trees.ratio bE piE.
  case: eqP => _; last by rewrite !mul0r mulr0.
  rewrite mul1r mulrCA; congr (_ * _).
  have [-> | a_neq0] := eqVneq (behavior (state w) a) 0; first by rewrite mul0r invr0 mulr0.
  by field.
have massE y : squared_mass t y = E b t [::] (on y).
  elim: t y => [|t IHt] y; first by rewrite /= /on rho_nil expr1n mulr1 eq_sym.
  transitivity (E b t [::] (fun w => \sum_(x : S) squared_weight x y * on x w)); last first.
    by rewrite E_last; apply: eq_E => w _; rewrite on_next.
  rewrite E_sum; by apply: eq_bigr => x _; rewrite E_scale -IHt mulrC.
rewrite (eq_bigr _ (fun y _ => massE y)) -E_sum; apply: eq_E => w _.
by rewrite (pick (fun=> rho w ^+ 2)).
Qed.

End States.

End SecondMoments.
