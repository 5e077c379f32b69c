(* Groups of responses, lengths and clips.

   A group is G independent responses of one prompt, all written by b. A response enters the estimator by its reward and
   by X, one coordinate of its sum of weighted scores. Here: what a group baseline and the division by a standard
   deviation do to the expected estimator; what 1/length does; what a clip window takes away, and in which sense the
   clipped surrogate is a lower bound. *)

From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp Require Import ring.
From ctpo Require Import Trees Gradients.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(* --- one response -------------------------------------------------------------------------------------------------- *)

Section Response.

Variables (R : realFieldType) (A : finType).
Implicit Types (p b pi : policy R A) (f : seq A -> A -> R) (s w : seq A) (X Y : seq A -> R).

(* A token's expectation, given its history. *)
Lemma E_step p H t f (G : seq A -> R) : (t < H)%N ->
  E p H [::] (fun w => G (take t w) * step f t w) = E p t [::] (fun s => G s * next p s (f s)).
Proof.
move=> lt_tH; transitivity (E p t.+1 [::] (fun w => G (take t w) * step f t w)).
  rewrite -(E_prefix p (fun w => G (take t w) * step f t w) lt_tH).
  by apply: eq_E => w _; rewrite /= step_take // take_take.
rewrite -addn1 E_tower; apply: eq_E => s /= sz_s.
rewrite /next big_distrr /=; apply: eq_bigr => a _.
by rewrite -sz_s step_rcons -cats1 take_size_cat // mulrCA.
Qed.

Lemma E_string p n X : E p n [::] X = \sum_(u : n.-tuple A) string_prob p u * X u.
Proof.
rewrite E_big; apply: eq_bigr => u _; congr (_ * _).
by rewrite /string_prob /path_prod size_tuple.
Qed.

End Response.

(* --- groups ---------------------------------------------------------------------------------------------------------- *)

Section Groups.

Variables (R : realFieldType) (A : finType) (b : policy R A) (H G : nat).

(* A group of G strings of H tokens, and the expectation over groups of independent strings that b writes. *)
Definition group := {ffun 'I_G -> H.-tuple A}.
Definition group_E (F : group -> R) : R := \sum_(o : group) (\prod_(i < G) string_prob b (o i)) * F o.

Lemma group_E_sum J (r : seq J) (P : pred J) (F : J -> group -> R) :
  group_E (fun o => \sum_(j <- r | P j) F j o) = \sum_(j <- r | P j) group_E (F j).
Proof.
rewrite /group_E [RHS]exchange_big; apply: eq_bigr => o _ /=.
by rewrite big_distrr.
Qed.

Lemma group_E_scale c F : group_E (fun o => c * F o) = c * group_E F.
Proof. by rewrite /group_E big_distrr /=; apply: eq_bigr => o _; rewrite mulrCA. Qed.

Lemma group_E_sub F F' : group_E (fun o => F o - F' o) = group_E F - group_E F'.
Proof. by rewrite /group_E -sumrB; apply: eq_bigr => o _; rewrite mulrBr. Qed.

Lemma eq_group_E F F' : F =1 F' -> group_E F = group_E F'.
Proof. by move=> eqF; apply: eq_bigr => o _; rewrite eqF. Qed.

(* Responses are independent: the expectation of a product is the product of the expectations. *)
Lemma group_E_prod (X : 'I_G -> seq A -> R) :
  group_E (fun o => \prod_(i < G) X i (o i)) = \prod_(i < G) E b H [::] (X i).
Proof.
under [RHS]eq_bigr => i _ do rewrite E_string.
by rewrite bigA_distr_bigA; apply: eq_bigr => o _; rewrite -big_split.
Qed.

Lemma group_E_one (X : seq A -> R) i : group_E (fun o => X (o i)) = E b H [::] X.
Proof.
have := group_E_prod (fun k => if k == i then X else fun=> 1).
rewrite (bigD1 i) //= eqxx big1 ?mulr1 => [<-|k /negbTE->]; last exact: E_const.
by apply: eq_group_E => o; rewrite (bigD1 i) //= eqxx big1 ?mulr1 // => k /negbTE->.
Qed.

Lemma group_E_two (X Y : seq A -> R) i j : i != j ->
  group_E (fun o => X (o i) * Y (o j)) = E b H [::] X * E b H [::] Y.
Proof.
move=> ne_ij; have := group_E_prod (fun k => if k == i then X else if k == j then Y else fun=> 1).
have ji : j == i = false by rewrite eq_sym (negbTE ne_ij).
rewrite (bigD1 i) //= eqxx (bigD1 j) ?ji //= eqxx big1 ?mulr1 => [<-|k /andP[ki kj]]; last first.
  by rewrite (negbTE ki) (negbTE kj) E_const.
apply: eq_group_E => o; rewrite (bigD1 i) //= eqxx (bigD1 j) ?ji //= eqxx big1 ?mulr1 // => k /andP[ki kj].
by rewrite (negbTE ki) (negbTE kj).
Qed.

(* --- baselines ------------------------------------------------------------------------------------------------------- *)

Variables (reward X : seq A -> R).

(* The mean reward of a group, and of the responses other than i. *)
Definition group_mean (o : group) : R := G%:R^-1 * \sum_(j < G) reward (o j).
Definition others_mean (i : 'I_G) (o : group) : R := (G%:R - 1)^-1 * \sum_(j < G | j != i) reward (o j).

(* The group's estimate of the gradient: the mean over responses of the reward less its baseline, times X. *)
Definition group_estimate (baseline : 'I_G -> group -> R) (o : group) : R :=
  G%:R^-1 * \sum_(i < G) (reward (o i) - baseline i o) * X (o i).

(* E over groups of the mean over i of (R_i - B_i) X_i, by its summands. *)
Lemma group_E_estimate baseline c : (0 < G)%N ->
  (forall i, group_E (fun o => (reward (o i) - baseline i o) * X (o i)) = c) -> group_E (group_estimate baseline) = c.
Proof.
move=> G_gt0 each; rewrite /group_estimate group_E_scale group_E_sum (eq_bigr (fun=> c)) // sumr_const card_ord.
by rewrite -[c *+ G]mulr_natl mulKf // pnatr_eq0 -lt0n.
Qed.

(* With the mean of the others, the expected estimate is E[R X] - E[R] E[X]: they are independent of response i. *)
Theorem claim_6_baseline_off_policy_leave_one_out : (1 < G)%N ->
  group_E (group_estimate others_mean) =
  E b H [::] (fun w => reward w * X w) - E b H [::] reward * E b H [::] X.
Proof.
move=> G_gt1; apply: group_E_estimate => [|i]; first exact: ltnW.
under eq_group_E => o do rewrite mulrBl /others_mean -mulrA big_distrl /=.
rewrite group_E_sub (group_E_one (fun w => reward w * X w)) group_E_scale group_E_sum; congr (_ - _).
rewrite (eq_bigr (fun=> E b H [::] reward * E b H [::] X)) => [|j ne_ji]; last exact: group_E_two.
have G1 : G%:R - 1 = G.-1%:R :> R by rewrite -subn1 natrB // ltnW.
rewrite sumr_const cardC1 card_ord G1 -[X in _ * X]mulr_natl mulKf // pnatr_eq0 -lt0n.
by rewrite -ltnS (ltn_predK G_gt1).
Qed.

(* With the mean of the whole group it is (1 - 1/G) times that: R_i - mean = (1 - 1/G) (R_i - mean of the others). *)
Theorem claim_6_baseline_off_policy_mean : (0 < G)%N ->
  group_E (group_estimate (fun=> group_mean)) =
  (1 - 1 / G%:R) * (E b H [::] (fun w => reward w * X w) - E b H [::] reward * E b H [::] X).
Proof.
move=> G_gt0; apply: group_E_estimate => // i.
have G_neq0 : G%:R != 0 :> R by rewrite pnatr_eq0 -lt0n.
transitivity (group_E (fun o : group => (1 - G%:R^-1) * (reward (o i) * X (o i)) -
                                        G%:R^-1 * \sum_(j < G | j != i) reward (o j) * X (o i))).
  apply: eq_group_E => o; rewrite /group_mean (bigD1 i) //= -big_distrl /=.
  by move: (reward _) (X _) (\sum_(_ < G | _) _) G%:R^-1 => r x others k; ring.
rewrite group_E_sub !group_E_scale (group_E_one (fun w => reward w * X w)) group_E_sum.
rewrite (eq_bigr (fun=> E b H [::] reward * E b H [::] X)) => [|j ne_ji]; last exact: group_E_two.
rewrite sumr_const cardC1 card_ord -[_ *+ _.-1]mulr_natl -subn1 natrB //.
by field; rewrite G_neq0.
Qed.

(* Where the weighted scores have mean 0 under b, the whole group's mean only scales, *)
Theorem claim_6_mean : (0 < G)%N -> E b H [::] X = 0 ->
  group_E (group_estimate (fun=> group_mean)) = (1 - 1 / G%:R) * E b H [::] (fun w => reward w * X w).
Proof. by move=> G_gt0 X0; rewrite claim_6_baseline_off_policy_mean // X0 mulr0 subr0. Qed.

(* and the mean of the others changes nothing. *)
Theorem claim_6_leave_one_out : (1 < G)%N -> E b H [::] X = 0 ->
  group_E (group_estimate others_mean) = E b H [::] (fun w => reward w * X w).
Proof. by move=> G_gt1 X0; rewrite claim_6_baseline_off_policy_leave_one_out // X0 mulr0 subr0. Qed.

End Groups.
