(* Second moments of the cumulative ratio: how they compound, when the product formula holds, and by how much the ratio
   of the whole string is noisier than that of its first t tokens; the ratios of single tokens are uncorrelated in any
   case. Then a third policy between sampler and target: which weights correct for it, and what a cap takes away.

   The second moment is compounded by the divergence chi2 averaged under b tilted by rho^2. The product formula averages
   it under b, which is the same thing only if rho^2 and chi2 are uncorrelated. *)

From mathcomp Require Import all_ssreflect all_algebra ring.
From ctpo Require Import Trees Expectations Coins.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(* --- chapter 2: how the second moment compounds ------------------------------------------------------------------- *)

(* The mean of a token: constants. *)
Lemma next_const (R : realFieldType) (A : finType) (p : policy R A) s c : next p s (fun=> c) = c.
Proof. by rewrite /next -big_distrl /= prob_sum1 mul1r. Qed.

Lemma next_scale (R : comRingType) (A : finType) (p : seq A -> A -> R) s c f :
  next p s (fun a => c * f a) = c * next p s f.
Proof. by rewrite /next big_distrr /=; apply: eq_bigr => a _; rewrite mulrCA. Qed.

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

Lemma second_moment0 : second_moment 0 = 1.
Proof. by rewrite /second_moment /= rho_nil expr1n. Qed.

(* What a token adds to the second moment. *)
Theorem claim_2_recursion_increment t :
  second_moment t.+1 = second_moment t + E b t [::] (fun s => rho s ^+ 2 * chi2 s).
Proof. exact: E_rho_sqr_last. Qed.

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

Lemma second_moment_ge1 t : 1 <= second_moment t.
Proof. by rewrite -subr_ge0 -(Var_rho AC (leqnn t)) Var_ge0. Qed.

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
move=> lt_kH; rewrite (E_token b lt_kH ratio (fun _ x => x ^+ 2)) -{1}(E_const b k [::] 1) -E_add.
by apply: eq_E => s _; apply: next_ratio_sqr.
Qed.

(* What is known before token k + 1 has the same mean with its ratio as without. *)
Lemma E_known_ratio H k (Y : seq A -> R) : (k < H)%N ->
  E b H [::] (fun w => Y (take k w) * step ratio k w) = E b k [::] Y.
Proof.
move=> lt_kH; rewrite E_known_step //; apply: eq_E_reachable => // s _ reach.
rewrite -[RHS]mulr1; congr (_ * _); rewrite -(next_const pi s 1) -(next_ratio AC _ reach).
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

(* When the product formula holds: up to token T it does if and only if rho_k^2 and the divergence of the token after
   are uncorrelated for all k < T. One step of the recursion at a time. *)
Theorem claim_2_product_iff T :
  (forall t, (t <= T)%N -> Var b T [::] (fun w => rho (take t w)) = \prod_(k < t) (1 + chi2_marginal k) - 1) <->
  (forall k, (k < T)%N -> Cov b k [::] (fun s => rho s ^+ 2) chi2 = 0).
Proof.
have -> : (forall t, (t <= T)%N -> Var b T [::] (fun w => rho (take t w)) = \prod_(k < t) (1 + chi2_marginal k) - 1) <->
          (forall t, (t <= T)%N -> second_moment t = \prod_(k < t) (1 + chi2_marginal k)).
  split=> formula t le_tT; first by apply: (addIr (- 1)); rewrite -formula // (Var_rho AC).
  by rewrite (Var_rho AC) // -/(second_moment t) formula.
have covE k : Cov b k [::] (fun s => rho s ^+ 2) chi2 =
    second_moment k.+1 - second_moment k * (1 + chi2_marginal k).
  rewrite claim_2_recursion_increment /Cov -/(second_moment k) -/(chi2_marginal k).
  by rewrite mulrDr mulr1 opprD addrA [second_moment k + _]addrC addrK.
split=> [formula k lt_kT | cov0 t].
  by rewrite covE !formula ?(ltnW lt_kT) // big_ord_recr subrr.
elim: t => [_|t IHt lt_tT]; first by rewrite second_moment0 big_ord0.
rewrite big_ord_recr -IHt ?(ltnW lt_tT) //.
by apply/eqP; rewrite -subr_eq0 -covE cov0.
Qed.

(* Prop 2(ii): the product formula holds if chi2 is the same after all histories of a length that b can write. Tokens
   may well depend on the history. *)
Theorem claim_2_product H t : (t <= H)%N ->
  (forall s s', reachable b s -> reachable b s' -> size s = size s' -> chi2 s = chi2 s') ->
  Var b H [::] (fun w => rho (take t w)) = \prod_(k < t) (1 + chi2_marginal k) - 1.
Proof.
move=> le_tH same; rewrite (Var_rho AC le_tH) -(Var_rho AC (leqnn t)).
apply: (claim_2_product_iff t).2 => // k _; rewrite /Cov mulrC -E_scale.
apply/eqP; rewrite subr_eq0; apply/eqP; apply: eq_E_reachable => // s sz_s reach.
rewrite mulrC; congr (_ * _); rewrite -[LHS](E_const b k [::]).
by apply: eq_E_reachable => // s' sz_s' reach'; apply: same; rewrite ?sz_s ?sz_s'.
Qed.

(* It is enough that chi2 = c_k after the histories of k tokens that pi can write: no others have any weight. *)
Theorem claim_2_product_reachable H t (c : nat -> R) : (t <= H)%N ->
  (forall s, reachable pi s -> chi2 s = c (size s)) ->
  Var b H [::] (fun w => rho (take t w)) = \prod_(k < t) (1 + c k) - 1.
Proof.
move=> le_tH chi2c; rewrite (Var_rho AC le_tH) -/(second_moment t); congr (_ - 1).
elim: t {le_tH} => [|t IHt]; first by rewrite second_moment0 big_ord0.
rewrite claim_2_recursion_increment big_ord_recr -IHt /= mulrDr mulr1 [_ * c t]mulrC -E_scale.
congr (_ + _); apply: eq_E_reachable => // s sz_s reach.
have [reach_pi | ] := boolP (reachable pi s); first by rewrite mulrC chi2c ?sz_s.
by move=> /unreachable zero; rewrite (rho_string_prob pi reach) zero !mul0r expr0n mulr0 mul0r.
Qed.

(* The ratios of the tokens are independent: the mean of a product of functions of one ratio each is the product of
   their means. Then the product formula holds, as rho_t^2 is such a product. *)
Definition independent_ratios H := forall phi : nat -> R -> R,
  E b H [::] (fun w => \prod_(k < H) phi k (step ratio k w)) =
  \prod_(k < H) E b H [::] (fun w => phi k (step ratio k w)).

Theorem claim_2_product_independent H t : (t <= H)%N -> independent_ratios H ->
  Var b H [::] (fun w => rho (take t w)) = \prod_(k < t) (1 + chi2_marginal k) - 1.
Proof.
move=> le_tH indep; rewrite (Var_rho AC le_tH); congr (_ - 1).
rewrite -(E_prefix b (fun s => rho s ^+ 2) le_tH).
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
rewrite big_ord_recr (E_token b _ ratio (fun s x => X s * phi H x)) // (E_token b _ ratio (fun _ x => phi H x)) //.
set c := E b H [::] (fun s => next b s (fun a => phi H (ratio s a))).
transitivity (E b H [::] (fun s => c * X s)).
  apply: eq_E => s /= sz_s; rewrite next_scale mulrC; congr (_ * _); rewrite -[LHS](E_const b H [::]).
  apply: eq_E => s' /= sz_s'; apply: eq_bigr => a _.
  by have [eq_b eq_pi] := free s s' a (etrans sz_s (esym sz_s')); rewrite /Trees.ratio eq_b eq_pi.
rewrite E_scale mulrC IHH; congr (_ * _); apply: eq_bigr => k _.
by rewrite !(E_token b _ ratio (fun _ x => phi k x)) // ltnS ltnW.
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

(* --- 2.general: how far the product formula can be off ------------------------------------------------------------ *)

Section TwoKinds.

Variables (R : realFieldType) (q : R).
Hypothesis q01 : 0 <= q <= 1.

(* Against b = 1/2, a target that writes a first 1 with probability q and then a 1 with 3/4 for good; after a first 0 it
   writes what b writes. *)
Definition coin_flips := coins (fun=> half01 R).
Definition hot_target := coins (hot_or_cold01 q01 (fraction01 R (isT : 3 <= 4)%N)).

Lemma chi2_coin_flips s : chi2 coin_flips hot_target s = (2%:R * hot_or_cold q (3%:R / 4%:R) s - 1) ^+ 2.
Proof. by rewrite /chi2 big_bool /= /coin; field. Qed.

(* The second moment, and what the product formula says that it is: half of b's strings have chi2 = 1/4 at every token
   after the first. *)
Theorem claim_2_general_true t : second_moment coin_flips hot_target t.+1 =
  2%:R * (q ^+ 2 * (5%:R / 4%:R) ^+ t + (1 - q) ^+ 2).
Proof.
rewrite /second_moment E_first /next big_bool.
rewrite (@second_moment_from _ _ _ _ t [:: true] 4%:R^-1) => [|u]; last by rewrite chi2_coin_flips /=; field.
rewrite (@second_moment_from _ _ _ _ t [:: false] 0) => [|u]; last by rewrite chi2_coin_flips /=; field.
rewrite -[[:: true]]/(rcons [::] true) -[[:: false]]/(rcons [::] false) !rho_rcons !rho_nil /ratio /=.
have -> : 1 + 4%:R^-1 = 5%:R / 4%:R :> R by field.
by rewrite addr0 expr1n; move: (_ ^+ t) => z; field.
Qed.

Theorem claim_2_general_formula t : \prod_(k < t.+1) (1 + chi2_marginal coin_flips hot_target k) =
  2%:R * (q ^+ 2 + (1 - q) ^+ 2) * (9%:R / 8%:R) ^+ t.
Proof.
rewrite big_ord_recl; congr (_ * _).
  by rewrite /chi2_marginal [E _ _ _ _]chi2_coin_flips /=; ring.
rewrite (eq_bigr (fun=> 9%:R / 8%:R)) ?prodr_const ?card_ord // => k _.
rewrite /chi2_marginal E_first /next big_bool.
have known a n : E coin_flips n [:: a] (chi2 coin_flips hot_target) = chi2 coin_flips hot_target [:: a].
  by rewrite -[RHS](E_const coin_flips n [:: a]); apply: eq_E => u _; rewrite !chi2_coin_flips.
by rewrite !known !chi2_coin_flips /=; field.
Qed.

End TwoKinds.

(* So the formula is too small by a factor that grows like (10/9)^t if the target writes a first 1 as often as b, *)
Theorem claim_2_general_above (R : realFieldType) t :
  \prod_(k < t.+1) (1 + chi2_marginal (coin_flips R) (hot_target (half01 R)) k) * (10%:R / 9%:R) ^+ t / 2%:R <=
  second_moment (coin_flips R) (hot_target (half01 R)) t.+1.
Proof.
rewrite claim_2_general_formula claim_2_general_true -[_ * _ ^+ t * _ ^+ t]mulrA -exprMn.
have -> : 9%:R / 8%:R * (10%:R / 9%:R) = 5%:R / 4%:R :> R by field.
rewrite -subr_ge0 (_ : _ - _ = 2%:R^-1) ?invr_ge0 ?ler0n //.
by move: (_ ^+ t) => z; field.
Qed.

(* and too large by (9/8)^t if it never writes one. *)
Theorem claim_2_general_below (R : realFieldType) (zero01 : 0 <= (0 : R) <= 1) t :
  second_moment (coin_flips R) (hot_target zero01) t.+1 * (9%:R / 8%:R) ^+ t =
  \prod_(k < t.+1) (1 + chi2_marginal (coin_flips R) (hot_target zero01) k).
Proof. by rewrite claim_2_general_formula claim_2_general_true; move: (_ ^+ t) (_ ^+ t) => z y; ring. Qed.

(* --- chapter 2r: the ratio of two variances ----------------------------------------------------------------------- *)

Section VarianceRatio.

Variable R : realFieldType.
Implicit Types (d x y e : R) (H t n : nat).

(* Var(rho_H) / Var(rho_t) where every token has chi2 = d. *)
Definition variance_ratio d H t : R := ((1 + d) ^+ H - 1) / ((1 + d) ^+ t - 1).

(* 1 + y + ... + y^(n-1) = (y^n - 1) / (y - 1). *)
Definition geometric y n : R := \sum_(i < n) y ^+ i.

Lemma geometricS y n : geometric y n.+1 = geometric y n + y ^+ n.
Proof. by rewrite /geometric big_ord_recr. Qed.

Lemma geometricSl y n : geometric y n.+1 = 1 + y * geometric y n.
Proof.
rewrite /geometric big_ord_recl expr0 big_distrr; congr (_ + _).
by apply: eq_bigr => i _; rewrite exprS.
Qed.

Lemma geometric_ge y n : 1 <= y -> n%:R <= geometric y n.
Proof.
move=> y_ge1; elim: n => [|n IHn]; first by rewrite /geometric big_ord0.
by rewrite geometricS -addn1 natrD ler_add // exprn_ege1.
Qed.

Lemma geometric_gt0 y n : 1 <= y -> (0 < n)%N -> 0 < geometric y n.
Proof. by move=> y_ge1 n_gt0; apply: lt_le_trans (geometric_ge _ y_ge1); rewrite ltr0n. Qed.

Lemma variance_ratio_geometric d H t : 0 < d -> variance_ratio d H t = geometric (1 + d) H / geometric (1 + d) t.
Proof. by move=> d_gt0; rewrite /variance_ratio !subrX1 [1 + d]addrC addrK -mulf_div divff ?mul1r ?gt_eqF. Qed.

Lemma geometric_le y n t : 1 <= y -> (t <= n)%N -> geometric y t <= t%:R * y ^+ n.
Proof.
move=> y_ge1; elim: t => [|t IHt] lt_tn; first by rewrite /geometric big_ord0 mul0r.
rewrite geometricS -addn1 natrD mulrDl mul1r ler_add ?IHt ?(ltnW lt_tn) //.
by apply: ler_weexpn2l => //; apply: ltnW.
Qed.

(* The terms of the sum grow, so the mean of the first H is at least that of the first t, *)
Lemma geometric_mean y H t : 1 <= y -> (t <= H)%N -> H%:R * geometric y t <= t%:R * geometric y H.
Proof.
move=> y_ge1 /subnKC <-; elim: (H - t)%N => [|n IHn]; first by rewrite addn0.
by rewrite addnS geometricS -addn1 natrD mulrDl mulrDr mul1r ler_add // geometric_le // leq_addr.
Qed.

(* and the last t of H add up to y^(H-t) times the first t, *)
Lemma geometric_last y H t : 1 <= y -> (t < H)%N -> y ^+ (H - t) * geometric y t < geometric y H.
Proof.
move=> y_ge1 lt_tH; have y_gt0 : 0 < y by apply: lt_le_trans y_ge1.
rewrite -{2}(subnKC (ltnW lt_tH)) -(subnSK lt_tH); elim: (H - t.+1)%N => [|n IHn].
  by rewrite addn1 geometricSl expr1 -subr_gt0 addrK ltr01.
rewrite addnS geometricSl exprS -mulrA (lt_trans (y := y * geometric y (t + n.+1))) ?ltr_pmul2l //.
by rewrite -subr_gt0 addrK ltr01.
Qed.

(* and are no more than t of them can be if each is at most the largest. *)
Lemma geometric_upper y H t : 1 <= y -> (t <= H)%N -> t%:R * geometric y H <= H%:R * y ^+ (H - t) * geometric y t.
Proof.
move=> y_ge1 le_tH; have y_ge0 : 0 <= y by apply: le_trans y_ge1.
rewrite -{1 2}(subnKC le_tH); elim: (H - t)%N => [|n IHn]; first by rewrite addn0 expr0 mulr1.
rewrite addnS geometricSl mulrDr mulr1 mulrCA -addn1 natrD [_ + 1]addrC !mulrDl mul1r ler_add //.
  by apply: le_trans (geometric_ge _ y_ge1) _; rewrite ler_pemull ?exprn_ege1 // sumr_ge0 // => i _; apply: exprn_ge0.
by apply: le_trans (ler_wpmul2l y_ge0 IHn) _; rewrite exprS !mulrA [y * _]mulrC.
Qed.

(* max(H/t, (1+d)^(H-t)) <= ratio <= (H/t) (1+d)^(H-t). *)
Theorem claim_2r_bounds d H t : 0 < d -> (0 < t <= H)%N ->
  Num.max (H%:R / t%:R) ((1 + d) ^+ (H - t)) <= variance_ratio d H t <= H%:R / t%:R * (1 + d) ^+ (H - t).
Proof.
move=> d_gt0 /andP[t_gt0 le_tH]; have y_ge1 : 1 <= 1 + d by rewrite ler_addl ltW.
have G_gt0 := geometric_gt0 y_ge1 t_gt0; have tR_gt0 : 0 < t%:R :> R by rewrite ltr0n.
rewrite le_maxl variance_ratio_geometric // !ler_pdivl_mulr // ler_pdivr_mulr //.
rewrite ![H%:R / t%:R * _]mulrAC -[_ / t%:R * _]mulrAC ler_pdivr_mulr // ler_pdivl_mulr //.
rewrite ![_ * t%:R]mulrC geometric_mean // geometric_upper //= andbT.
by move: le_tH; rewrite leq_eqVlt => /predU1P[-> | /(geometric_last y_ge1)/ltW //]; rewrite subnn mul1r.
Qed.

(* The printed factor alone, (1+d)^(H-t), is always too small. *)
Theorem claim_2r_limit d H t : 0 < d -> (0 < t < H)%N -> (1 + d) ^+ (H - t) < variance_ratio d H t.
Proof.
move=> d_gt0 /andP[t_gt0 lt_tH]; have y_ge1 : 1 <= 1 + d by rewrite ler_addl ltW.
by rewrite variance_ratio_geometric // ltr_pdivl_mulr ?geometric_gt0 // geometric_last.
Qed.

(* What the factor lacks: the ratio is (1+d)^(H-t) (1 - x^H) / (1 - x^t) with x = 1/(1+d). *)
Theorem claim_2r_limit_form d H t (x := (1 + d)^-1) : 0 < d -> (0 < t <= H)%N ->
  variance_ratio d H t = (1 + d) ^+ (H - t) * ((1 - x ^+ H) / (1 - x ^+ t)).
Proof.
move=> d_gt0 /andP[t_gt0 le_tH]; have y_gt1 : 1 < 1 + d by rewrite ltr_addl.
have y_neq0 n : (1 + d) ^+ n != 0 by rewrite expf_neq0 // gt_eqF // (lt_trans ltr01).
have : (1 + d) ^+ t - 1 != 0 by rewrite subr_eq0 gt_eqF // exprn_egt1 // -lt0n.
rewrite /variance_ratio /x !exprVn -{1 3}(subnK le_tH) exprD.
move: (y_neq0 (H - t)%N) (y_neq0 t); move: (_ ^+ (H - t)) (_ ^+ t) => z y z_neq0 yt_neq0 neq1.
by field; rewrite z_neq0 yt_neq0 neq1.
Qed.

Lemma growth_le d n : 0 < d <= 1 -> (1 + d) ^+ n <= 1 + d * (n%:R * 2%:R ^+ n).
Proof.
case/andP=> d_gt0 d_le1; have y_ge1 : 1 <= 1 + d by rewrite ler_addl ltW.
rewrite -ler_subl_addl subrX1 [1 + d]addrC addrK [d + 1]addrC ler_pmul2l //.
apply: le_trans (geometric_le y_ge1 (leqnn n)) _; apply: ler_wpmul2l; rewrite ?ler0n //.
by rewrite ler_expn2r ?nnegrE ?ler0n ?(le_trans ler01 y_ge1) // (natrD _ 1 1) ler_add2l.
Qed.

(* As d tends to 0 the ratio tends to H/t, and the printed factor to 1. *)
Theorem claim_2r_limit_near H t e : (0 < t <= H)%N -> 0 < e ->
  exists2 delta, 0 < delta & forall d, 0 < d < delta ->
    H%:R / t%:R <= variance_ratio d H t <= H%:R / t%:R + e /\ 1 <= (1 + d) ^+ (H - t) <= 1 + e.
Proof.
move=> tH e_gt0; have /andP[t_gt0 le_tH] := tH.
set c : R := H%:R / t%:R; set n := (H - t)%N; pose k : R := n%:R * 2%:R ^+ n.
have c_ge1 : 1 <= c by rewrite ler_pdivl_mulr ?ltr0n // mul1r ler_nat.
have c_gt0 : 0 < c by apply: lt_le_trans c_ge1.
have k_ge0 : 0 <= k by rewrite mulr_ge0 ?exprn_ge0 ?ler0n.
have ck_gt0 : 0 < c * (k + 1) by rewrite mulr_gt0 // ltr_paddl ?ltr01.
exists (Num.min 1 (e / (c * (k + 1)))) => [|d]; first by rewrite lt_minr ltr01 divr_gt0.
rewrite lt_minr => /and3P[d_gt0 d_lt1 d_small].
have small : c * (d * k) <= e.
  rewrite (le_trans (y := d * (c * (k + 1)))) ?(ltW (_ : _ < e)) -?ltr_pdivl_mulr //.
  by rewrite mulrCA ler_pmul2l // ler_pmul2l // ler_addl ler01.
have growth : (1 + d) ^+ n <= 1 + d * k by rewrite growth_le // d_gt0 ltW.
have /andP[] := claim_2r_bounds d_gt0 tH; rewrite le_maxl => /andP[lower _] upper; split.
  rewrite lower (le_trans upper) // (le_trans (y := c * (1 + d * k))) ?ler_pmul2l //.
  by rewrite mulrDr mulr1 ler_add2l.
rewrite exprn_ege1 /= ?ler_addl ?(ltW d_gt0) // (le_trans growth) // ler_add2l (le_trans _ small) //.
by rewrite ler_pemull // mulr_ge0 // ltW.
Qed.

(* Once (1+d)^t is large, the ratio is (1+d)^(H-t) but for a factor that tends to 1. *)
Theorem claim_2r_limit_far d H t : 0 < d -> (0 < t <= H)%N ->
  (1 + d) ^+ (H - t) <= variance_ratio d H t <= (1 + d) ^+ (H - t) * (1 + ((1 + d) ^+ t - 1)^-1).
Proof.
move=> d_gt0 tH; have /andP[t_gt0 le_tH] := tH.
have /andP[] := claim_2r_bounds d_gt0 tH; rewrite le_maxl => /andP[_ ->] _ /=.
have gt0 : 0 < (1 + d) ^+ t - 1 by rewrite subr_gt0 exprn_egt1 ?ltr_addl // -lt0n.
rewrite /variance_ratio ler_pdivr_mulr // -mulrA mulrDl mul1r mulVf ?gt_eqF // subrK -exprD subnK //.
by rewrite ler_subl_addl ler_addr ler01.
Qed.

End VarianceRatio.

(* The ratio of the variances, where every history that pi can write has chi2 = d. Tokens may depend on each other. *)
Theorem claim_2r_bounds_ratio (R : realFieldType) (A : finType) (b pi : policy R A) (d : R) H t :
  absolutely_continuous b pi -> (forall s, reachable pi s -> chi2 b pi s = d) -> (t <= H)%N ->
  Var b H [::] (rho b pi) / Var b H [::] (fun w => rho b pi (take t w)) = variance_ratio d H t.
Proof.
move=> AC chi2d le_tH; have VarE n : (n <= H)%N -> Var b H [::] (fun w => rho b pi (take n w)) = (1 + d) ^+ n - 1.
  by move=> le_nH; rewrite (claim_2_product_reachable AC (c := fun=> d)) // prodr_const card_ord.
rewrite /variance_ratio -!VarE //; congr (_ / _).
by rewrite /Var; congr (_ - _ ^+ 2); apply: eq_E => w sz_w; rewrite /= take_oversize ?sz_w.
Qed.

(* --- chapter 11: a third policy samples --------------------------------------------------------------------------- *)

Section ThreePolicies.

Variables (R : realFieldType) (A : finType) (mu b pi : policy R A).
Implicit Types (s w : seq A) (f X : seq A -> R).

(* The ratio of q over p turns an expectation under q into one under p. *)
Lemma E_correct (p q : policy R A) n X : absolutely_continuous p q ->
  E q n [::] X = E p n [::] (fun w => rho p q w * X w).
Proof. by move=> ac; rewrite (E_rho_times ac). Qed.

Section Corrected.

(* The sampler can write what the old policy can, and the old policy what the target can. *)
Hypotheses (AC_mu : absolutely_continuous mu b) (AC_b : absolutely_continuous b pi).

(* For samples of mu, the ratio of the whole string b/mu times rho_t = pi/b is unbiased for what is known at token t, *)
Theorem claim_11_prefix_sequence H t f : (t <= H)%N ->
  E mu H [::] (fun w => rho mu b w * (rho b pi (take t w) * f (take t w))) = E pi H [::] (fun w => f (take t w)).
Proof. by move=> le_tH; rewrite (E_rho_times AC_mu H (fun w => rho b pi (take t w) * f (take t w))) E_rho_prefix. Qed.

(* and so is the ratio of its first t tokens, which are all that the integrand has seen, *)
Theorem claim_11_prefix H t f : (t <= H)%N ->
  E mu H [::] (fun w => rho mu b (take t w) * (rho b pi (take t w) * f (take t w))) =
  E pi H [::] (fun w => f (take t w)).
Proof. by move=> le_tH; rewrite (E_rho_prefix AC_mu le_tH (fun s => rho b pi s * f s)) E_rho_prefix. Qed.

(* which is never noisier: given t tokens, the ratio of the string has the ratio so far as its mean. *)
Theorem claim_11_prefix_variance H t f : (t <= H)%N ->
  Var mu H [::] (fun w => rho mu b (take t w) * (rho b pi (take t w) * f (take t w))) <=
  Var mu H [::] (fun w => rho mu b w * (rho b pi (take t w) * f (take t w))).
Proof. by move=> le_tH; apply: (Var_rho_le AC_mu le_tH (fun s => rho b pi s * f s)). Qed.

(* Summed over the tokens, then, for any function of history and token, such as a score times the exact advantage: *)
Theorem claim_11_levels_prefix H (g : seq A -> A -> R) :
  E mu H [::] (fun w => \sum_(t < H) rho mu b (take t.+1 w) * (rho b pi (take t.+1 w) * step g t w)) =
  E pi H [::] (path_sum g).
Proof.
rewrite E_sum E_path_sum; apply: eq_bigr => t _.
rewrite (E_rho_known AC_mu (ltn_ord t)) => [|w _]; last by rewrite take_take ?step_take.
by rewrite (E_rho_known AC_b (ltn_ord t)) // => w _; rewrite step_take.
Qed.

Theorem claim_11_levels_sequence H (g : seq A -> A -> R) :
  E mu H [::] (fun w => rho mu b w * \sum_(t < H) rho b pi (take t.+1 w) * step g t w) = E pi H [::] (path_sum g).
Proof.
rewrite (E_rho_times AC_mu) E_sum E_path_sum; apply: eq_bigr => t _.
by rewrite (E_rho_known AC_b (ltn_ord t)) // => w _; rewrite step_take.
Qed.

(* The old policy cancels: corrected by its prefix, rho_t is the ratio of target and sampler. *)
Theorem claim_11_prefix_cancels w : reachable mu w -> rho mu b w * rho b pi w = rho mu pi w.
Proof.
move=> reach; rewrite !(rho_string_prob _ reach).
have [reach_b | ] := boolP (reachable b w).
  by rewrite (rho_string_prob pi reach_b) mulrC mulrA divfK ?gt_eqF.
move=> unreach; rewrite (unreachable unreach) (@unreachable _ _ pi) ?mul0r //.
by apply: contra unreach => /(reachable_AC AC_b).
Qed.

End Corrected.

(* Without a correction: the bias of rho_t, for a sampler that writes nothing that b cannot. *)
Theorem claim_11_none H t f : absolutely_continuous b mu -> absolutely_continuous b pi -> (t <= H)%N ->
  E mu H [::] (fun w => rho b pi (take t w) * f (take t w)) - E pi H [::] (fun w => f (take t w)) =
  E b H [::] (fun w => (rho b mu (take t w) - 1) * rho b pi (take t w) * f (take t w)).
Proof.
move=> AC_mu AC_pi le_tH; rewrite (E_prefix mu (fun s => rho b pi s * f s)) // E_prefix //.
rewrite (E_prefix b (fun s => (rho b mu s - 1) * rho b pi s * f s)) //.
by rewrite !(E_correct t _ AC_mu) !(E_correct t _ AC_pi) -E_sub; apply: eq_E => w _; ring.
Qed.

(* Its mean is off by the covariance of two ratios that are each unbiased under b. *)
Theorem claim_11_none_mean H t : absolutely_continuous b mu -> absolutely_continuous b pi -> (t <= H)%N ->
  E mu H [::] (fun w => rho b pi (take t w)) - 1 = Cov b t [::] (rho b mu) (rho b pi).
Proof.
by move=> AC_mu AC_pi le_tH; rewrite (E_prefix mu (rho b pi)) // /Cov E_rho_times // !E_rho // !rho_nil mulr1.
Qed.

(* If the ratio of a token has mean q under mu at every history, that of t tokens has mean q^t. *)
Theorem claim_11_none_power q t : (forall s, next mu s (ratio b pi s) = q) -> E mu t [::] (rho b pi) = q ^+ t.
Proof.
move=> mean_q; elim: t => [|t IHt]; first by rewrite /= rho_nil.
rewrite E_last exprSr mulrC -IHt -E_scale; apply: eq_E => w _.
rewrite mulrC -(mean_q ([::] ++ w)) -next_scale.
by apply: eq_bigr => a _; rewrite rho_rcons.
Qed.

(* A cap on the ratio of the string: truncated, a ratio above c counts as c; masked, as 0. *)
Definition truncated c (w : R) : R := Num.min w c.
Definition masked c (w : R) : R := if w <= c then w else 0.

(* What each cap takes from the mean, for any X: the part of b's mass that lies above it. *)
Theorem claim_11_sequence_cap_truncated c H X : absolutely_continuous mu b -> 0 <= c ->
  E mu H [::] (fun w => truncated c (rho mu b w) * X w) - E b H [::] X =
  - E b H [::] (fun w => Num.max 0 (1 - c / rho mu b w) * X w).
Proof.
move=> ac c_ge0; rewrite !(E_correct H _ ac) -E_sub -E_opp.
apply: eq_E => w _; rewrite cat0s -mulrBl mulrA -[RHS]mulNr; congr (_ * _).
have := rho_ge0 mu b w; rewrite /truncated le_eqVlt => /predU1P[<- | rho_gt0].
  by rewrite min_l // mul0r subr0 oppr0.
case: (leP (rho mu b w) c) => [le_c | gt_c].
  by rewrite max_l ?mulr0 ?subrr ?oppr0 // subr_le0 ler_pdivl_mulr // mul1r.
rewrite max_r; first by rewrite mulrBr mulr1 mulrC divfK ?gt_eqF // opprB.
by rewrite subr_ge0 ler_pdivr_mulr // mul1r ltW.
Qed.

Theorem claim_11_sequence_cap_masked c H X : absolutely_continuous mu b ->
  E mu H [::] (fun w => masked c (rho mu b w) * X w) - E b H [::] X =
  - E b H [::] (fun w => (c < rho mu b w)%R%:R * X w).
Proof.
move=> ac; rewrite !(E_correct H _ ac) -E_sub -E_opp.
apply: eq_E => w _; rewrite cat0s -mulrBl mulrA -[RHS]mulNr; congr (_ * _); rewrite /masked.
by case: leP => _; rewrite ?subrr ?mulr0 ?oppr0 // sub0r mulr1.
Qed.

(* Over long strings nothing is left: if the ratios have square roots u with a mean of at most q under mu (q is the
   affinity sum_a sqrt(mu b) of the two policies, below 1 where they differ), the weight capped at c^2 has a mean of at
   most c q^H, as min(w, c^2) <= c sqrt(w). *)
Theorem claim_11_sequence_cap_vanishes (u : seq A -> A -> R) q c H : 0 <= c ->
  (forall s a, 0 <= u s a) -> (forall s a, ratio mu b s a = u s a ^+ 2) -> (forall s, next mu s (u s) <= q) ->
  E mu H [::] (fun w => truncated (c ^+ 2) (rho mu b w)) <= c * q ^+ H.
Proof.
move=> c_ge0 u_ge0 uu mean_u.
have root_ge0 w : 0 <= path_prod u w by apply: prodr_ge0 => t _; rewrite /step; case: (drop _ _).
have rhoE w : rho mu b w = path_prod u w ^+ 2.
  by elim/last_ind: w => [|w a IHw]; rewrite ?rho_nil ?path_prod_nil ?expr1n // rho_rcons path_prod_rcons exprMn IHw uu.
have le_root w : truncated (c ^+ 2) (rho mu b w) <= c * path_prod u w.
  rewrite /truncated rhoE le_minl !expr2; case/orP: (le_total (path_prod u w) c) => le_cw.
    by rewrite ler_wpmul2r.
  by apply/orP; right; rewrite ler_wpmul2l.
apply: le_trans (E_le mu H [::] le_root) _; rewrite E_scale ler_wpmul2l //.
elim: H => [|H IHH]; first by rewrite /= path_prod_nil.
have q_ge0 : 0 <= q.
  by apply: le_trans (mean_u [::]); apply: sumr_ge0 => a _; rewrite mulr_ge0 ?prob_ge0.
rewrite exprS; apply: le_trans (ler_wpmul2l q_ge0 IHH); rewrite -E_scale E_last; apply: E_le => w.
rewrite mulrC; apply: le_trans (ler_wpmul2l (root_ge0 w) (mean_u w)); rewrite -next_scale.
by apply: ler_sum => a _; rewrite path_prod_rcons.
Qed.

End ThreePolicies.

(* --- 11.masked: what a cap does to the variance of a weight ------------------------------------------------------- *)

Section Caps.

Variables (R : realFieldType) (A : finType) (p : policy R A).
Implicit Types (s : seq A) (X : seq A -> R) (c : R).

Lemma Var_le_around n s X c : Var p n s X <= E p n s (fun w => (X w - c) ^+ 2).
Proof. by rewrite E_around ler_addl sqr_ge0. Qed.

(* Cutting a weight at c brings no two of its values further apart, *)
Lemma truncated_closer c (x y : R) : (truncated c x - truncated c y) ^+ 2 <= (x - y) ^+ 2.
Proof.
wlog le_xy : x y / x <= y.
  move=> closer; case/orP: (le_total x y) => [/closer // | /closer].
  by rewrite -sqrrN opprB -[X in _ <= X -> _]sqrrN opprB.
rewrite -sqrrN opprB -[X in _ <= X]sqrrN opprB /truncated.
have min_mono : Num.min x c <= Num.min y c by rewrite le_minr !le_minl le_xy lexx orbT.
rewrite ler_expn2r ?nnegrE ?subr_ge0 //.
case: (leP y c) => [le_yc | lt_cy]; first by rewrite min_l // (le_trans le_xy).
by case: (leP x c) => _; rewrite ?subrr ?subr_ge0 // ler_add2r ltW.
Qed.

(* so truncation never raises the variance. *)
Theorem claim_11_masked_truncated n s X c : Var p n s (fun w => truncated c (X w)) <= Var p n s X.
Proof.
apply: le_trans (Var_le_around _ _ _ (truncated c (E p n s X))) _; rewrite [X in _ <= X]Var_centered.
by apply: E_le => w; apply: truncated_closer.
Qed.

(* Masking loses at least as much of the mean of a non-negative weight as truncation does. *)
Theorem claim_11_masked_mean n s X c : 0 <= c ->
  E p n s (fun w => masked c (X w)) <= E p n s (fun w => truncated c (X w)) <= E p n s X.
Proof.
move=> c_ge0; apply/andP; split; apply: E_le => w; rewrite /masked /truncated; last by rewrite le_minl lexx.
by case: (leP (X w) c).
Qed.

End Caps.
