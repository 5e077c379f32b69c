(* Groups of responses, lengths and clips.

   A group is G independent responses of one prompt, all written by b. A response enters the estimator by its reward and
   by X, one coordinate of its sum of weighted scores. Here: what a group baseline and the division by a standard
   deviation do to the expected estimator; what 1/length does; what a clip window takes away, and in which sense the
   clipped surrogate is a lower bound. *)

From mathcomp Require Import all_ssreflect all_algebra ring.
From ctpo Require Import Trees Expectations Gradients PolicyGradient.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(* --- groups ------------------------------------------------------------------------------------------------------- *)

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
under [RHS]eq_bigr => i _ do rewrite E_strings.
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

(* --- baselines ---------------------------------------------------------------------------------------------------- *)

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

(* --- the weights under which a baseline is free ------------------------------------------------------------------- *)

Section Weights.

Variables (R : realFieldType) (A : finType) (b pi : policy R A) (H : nat).
Implicit Types (s w : seq A) (f g : seq A -> A -> R) (X : seq A -> R).

Hypothesis AC : absolutely_continuous b pi.

(* E_b [rho_{t+1} f_t X] = E_pi [f_t E_b [X | F_{t+1}]]: the ratio corrects what is written up to token t + 1, and b
   goes on from there. *)
Lemma E_prefix_weight f X t : (t < H)%N ->
  E b H [::] (fun w => rho b pi (take t.+1 w) * step f t w * X w) =
  E pi H [::] (fun w => step f t w * E b (H - t.+1) (take t.+1 w) X).
Proof.
move=> lt_tH; rewrite -E_rest // => [|w _]; last by rewrite step_take.
by rewrite -(rho_switches AC lt_tH); apply: eq_E => w _; rewrite mulrA.
Qed.

(* The weights under which a baseline is free: none where b = pi, and r_t, rho_t and rho_H. (What `claim_6_mean` and
   `claim_6_leave_one_out` ask of X.) A score has mean 0 under pi given its history, and each of these weights holds the
   ratio of its token. *)
Theorem claim_6_mean_weights g : is_score pi g ->
  [/\ E pi H [::] (path_sum g) = 0,
      E b H [::] (fun w => \sum_(t < size w) step (fun s a => ratio b pi s a * g s a) t w) = 0,
      E b H [::] (fun w => \sum_(t < size w) rho b pi (take t.+1 w) * step g t w) = 0
    & E b H [::] (fun w => rho b pi w * path_sum g w) = 0].
Proof.
move=> score; split; first exact: E_score; last by rewrite E_rho_times // E_score.
- transitivity (E b H [::] (path_sum (fun s a => ratio b pi s a * g s a))) => //.
  rewrite E_path_sum big1 // => t _; rewrite E_step // -[RHS](E0 b t [::]).
  by apply: eq_E_reachable => // s _ reach; rewrite (next_ratio AC) ?score.
transitivity (E b H [::] (fun w => \sum_(t < H) rho b pi (take t.+1 w) * step g t w)).
  by apply: eq_E => w /= ->.
by rewrite E_sum big1 // => t _; rewrite E_rho_known ?E_step0 // => w _; rewrite step_take.
Qed.

(* --- lengths ------------------------------------------------------------------------------------------------------ *)

(* With the exact advantage, or any f_t = A_t g_t of the prefix and its token, the weight rho_t / T estimates
   sum_t E_pi [f_t E_b [1/T | F_{t+1}]]: b, not pi, decides how long the response becomes. T is any function of the
   finished string; the length is one. *)
Theorem claim_6_length_prop1 f (T : seq A -> R) :
  E b H [::] (fun w => \sum_(t < size w) rho b pi (take t.+1 w) / T w * step f t w) =
  E pi H [::] (fun w => \sum_(t < size w) step f t w * E b (H - t.+1) (take t.+1 w) (fun v => (T v)^-1)).
Proof.
transitivity (E b H [::] (fun w => \sum_(t < H) rho b pi (take t.+1 w) * step f t w * (T w)^-1)).
  by apply: eq_E => w /= sz_w; rewrite sz_w; apply: eq_bigr => t _; rewrite mulrAC.
rewrite E_sum [RHS](_ : _ = E pi H [::] (fun w => \sum_(t < H)
  step f t w * E b (H - t.+1) (take t.+1 w) (fun v => (T v)^-1))); last by apply: eq_E => w /= sz_w; rewrite sz_w.
by rewrite E_sum; apply: eq_bigr => t _; rewrite (E_prefix_weight f (fun v => (T v)^-1)).
Qed.

(* On-policy the length that is averaged is that of pi: the two agree where b and pi give 1/T the same mean. *)
Theorem claim_6_length_prop1_on_policy f (T : seq A -> R) :
  E pi H [::] (fun w => \sum_(t < size w) step f t w / T w) =
  E pi H [::] (fun w => \sum_(t < size w) step f t w * E pi (H - t.+1) (take t.+1 w) (fun v => (T v)^-1)).
Proof.
transitivity (E pi H [::] (fun w => \sum_(t < H) step f t w / T w)); first by apply: eq_E => w /= ->.
rewrite E_sum [RHS](_ : _ = E pi H [::] (fun w => \sum_(t < H)
  step f t w * E pi (H - t.+1) (take t.+1 w) (fun v => (T v)^-1))); last by apply: eq_E => w /= sz_w; rewrite sz_w.
rewrite E_sum; apply: eq_bigr => t _; rewrite -E_rest // => [|w _]; last by rewrite step_take.
by rewrite -E_split.
Qed.

(* --- clips -------------------------------------------------------------------------------------------------------- *)

(* A clip drops tokens from the gradient. Whichever it drops, as long as rho_{t+1}, the advantage and the position
   decide, all known at token t + 1: what is lost is E_pi [sum_t f_t 1{clipped}]. *)
Theorem claim_6_clip_identity f (clipped : nat -> seq A -> bool) :
  E b H [::] (fun w => \sum_(t < size w) rho b pi (take t.+1 w) * step f t w * (~~ clipped t (take t.+1 w))%:R) -
  E pi H [::] (path_sum f) =
  - E pi H [::] (fun w => \sum_(t < size w) step f t w * (clipped t (take t.+1 w))%:R).
Proof.
pose kept t w := step f t w * (~~ clipped t (take t.+1 w))%:R.
have term t : (t < H)%N -> E b H [::] (fun w => rho b pi (take t.+1 w) * kept t w) = E pi H [::] (kept t).
  by move=> lt_tH; apply: E_rho_known => // w _; rewrite /kept step_take // take_take.
transitivity (E pi H [::] (fun w => \sum_(t < H) kept t w) - E pi H [::] (path_sum f)).
  congr (_ - _); rewrite E_sum -(eq_bigr _ (fun (t : 'I_H) _ => term t (ltn_ord t))) -E_sum.
  by apply: eq_E => w /= sz_w; rewrite sz_w; apply: eq_bigr => t _; rewrite mulrA.
rewrite -E_sub -E_opp; apply: eq_E => w /= sz_w; rewrite /path_sum sz_w -sumrB -sumrN; apply: eq_bigr => t _.
by rewrite /kept; case: (clipped _ _); rewrite ?(mulr0, mulr1, sub0r, subrr, oppr0).
Qed.

(* Under the ratio of the sequence any function of the whole string may decide, and the advantage in f_t may be any. *)
Theorem claim_6_clip_identity_sequence (f : nat -> seq A -> R) (clipped : nat -> seq A -> bool) :
  E b H [::] (fun w => \sum_(t < size w) rho b pi w * f t w * (~~ clipped t w)%:R) -
  E pi H [::] (fun w => \sum_(t < size w) f t w) =
  - E pi H [::] (fun w => \sum_(t < size w) f t w * (clipped t w)%:R).
Proof.
transitivity (E b H [::] (fun w => rho b pi w * \sum_(t < size w) f t w * (~~ clipped t w)%:R) -
              E pi H [::] (fun w => \sum_(t < size w) f t w)).
  by congr (_ - _); apply: eq_E => w _; rewrite big_distrr /=; apply: eq_bigr => t _; rewrite mulrA.
rewrite E_rho_times // -E_sub -E_opp; apply: eq_E => w _.
rewrite -sumrB -sumrN; apply: eq_bigr => t _.
by case: (clipped _ _); rewrite ?(mulr0, mulr1, sub0r, subrr, oppr0).
Qed.

(* The window [lo, hi] of a ratio, and the clipped surrogate of a token, min(w A, clip(w) A). *)
Definition clip (lo hi x : R) : R := Num.max lo (Num.min x hi).
Definition clipped_value (lo hi x a : R) : R := Num.min (x * a) (clip lo hi x * a).

(* It never exceeds w A, so neither does its expectation: for any weights W and advantages, and any windows. *)
Theorem claim_6_pessimism (p : policy R A) (lo hi : nat -> R) (W : nat -> seq A -> R) f :
  (forall t w, clipped_value (lo t) (hi t) (W t w) (step f t w) <= W t w * step f t w) /\
  E p H [::] (fun w => \sum_(t < size w) clipped_value (lo t) (hi t) (W t w) (step f t w)) <=
  E p H [::] (fun w => \sum_(t < size w) W t w * step f t w).
Proof.
have pointwise t w : clipped_value (lo t) (hi t) (W t w) (step f t w) <= W t w * step f t w.
  by rewrite /clipped_value le_minl lexx.
by split=> //; apply: E_le => w; apply: ler_sum.
Qed.

(* With the advantages of b under rho_t the unclipped surrogate is J(pi) - J(b): the advantages of b add up to the
   reward less its mean under b, along any string. So the clipped one is a lower bound on the improvement. *)
Theorem claim_6_pessimism_improvement (reward : seq A -> R) (lo hi : nat -> R)
  (adv := advantage H reward b) (weight := fun t w => rho b pi (take t.+1 w)) :
  E b H [::] (fun w => \sum_(t < size w) weight t w * step adv t w) = objective H reward pi - objective H reward b /\
  E b H [::] (fun w => \sum_(t < size w) clipped_value (lo t) (hi t) (weight t w) (step adv t w)) <=
  objective H reward pi - objective H reward b.
Proof.
have unclipped : E b H [::] (fun w => \sum_(t < size w) weight t w * step adv t w) =
                 objective H reward pi - objective H reward b.
  rewrite performance_difference.
  transitivity (E b H [::] (fun w => \sum_(t < H) weight t w * step adv t w)); first by apply: eq_E => w /= ->.
  rewrite E_path_sum E_sum; by apply: eq_bigr => t _; apply: E_rho_known => // w _; rewrite step_take.
by split=> //; rewrite -unclipped; have [] := claim_6_pessimism b lo hi weight adv.
Qed.

End Weights.

(* --- the objective of 1/length ------------------------------------------------------------------------------------ *)

Section Length.

Variables (R : realFieldType) (A : finType) (p : policy R A) (g : seq A -> A -> R).

(* 1/T ascends another objective: E [(R - c)/T sum_t g_t] is the gradient of E [(R - c)/T], for any function T of the
   finished string, its length for one. *)
Theorem claim_6_length H (reward T : seq A -> R) c :
  E p H [::] (fun w => (reward w - c) / T w * path_sum g w) = gradient p g H (fun w => (reward w - c) / T w).
Proof. by rewrite policy_gradient; apply: eq_E => w _; rewrite mulrC. Qed.

(* The baseline is part of it: it takes away c E [(1/T) sum_t g_t], which is 0 for a constant T. *)
Theorem claim_6_length_baseline H (reward T : seq A -> R) c :
  gradient p g H (fun w => (reward w - c) / T w) =
  gradient p g H (fun w => reward w / T w) - c * E p H [::] (fun w => (T w)^-1 * path_sum g w).
Proof. by rewrite !policy_gradient -E_scale -E_sub; apply: eq_E => w _; ring. Qed.

End Length.

(* --- division by the standard deviation --------------------------------------------------------------------------- *)

Section Standardized.

Variables (R : realFieldType) (A : finType) (b : policy R A) (H G : nat).
Variables (right : pred (seq A)) (X : seq A -> R) (inverse_std : nat -> R).

(* Rewards of 0 and 1. The standard deviation of a group is a function of its number of successes, and so is its
   inverse; which function does not matter here (that of the population or of the sample, a constant added or not). *)
Let reward w : R := (right w)%:R.
Let mean := @group_mean R A H G reward.
Definition successes (o : group A H G) : nat := \sum_(j < G) right (o j).
Definition std_estimate (o : group A H G) : R :=
  G%:R^-1 * \sum_(i < G) inverse_std (successes o) * (reward (o i) - mean o) * X (o i).

Let p := E b H [::] reward.
Let D := E b H [::] (fun w => reward w * X w).

(* X less what the reward says of it: E [X' 1{reward = e}] = 0 for e = 0 and e = 1. *)
Let X' w := X w - D / (p * (1 - p)) * (reward w - p).

Hypotheses (X_mean : E b H [::] X = 0) (p_gt0 : 0 < p) (p_lt1 : p < 1).

Lemma p_neq01 : (p != 0) * (1 - p != 0).
Proof. by rewrite !lt0r_neq0 // subr_gt0. Qed.

Lemma X'_given (e : bool) : E b H [::] (fun w => (right w == e)%:R * X' w) = 0.
Proof.
have [p0 p1] := p_neq01.
have E1 : E b H [::] X' = 0.
  by rewrite /X' E_sub E_scale E_sub E_const X_mean -/p subrr mulr0 subr0.
have ER : E b H [::] (fun w => reward w * X' w) = 0.
  transitivity (E b H [::] (fun w => reward w * X w - D / p * reward w)).
    apply: eq_E => w _; rewrite /X' /reward; case: (right w) => /=; last by rewrite !mul0r mulr0 subr0.
    by field; rewrite p1 p0.
  by rewrite E_sub E_scale -/D -/p divfK // subrr.
case: e; first by rewrite -[RHS]ER; apply: eq_E => w _; rewrite eqb_id.
rewrite -[RHS](subrr 0) -{1}E1 -{1}ER -E_sub; apply: eq_E => w _.
by rewrite eqbF_neg /reward; case: (right w); rewrite /= ?mul1r ?mul0r ?subrr ?subr0.
Qed.

(* So, whatever is made of the rewards of a group, the part X' of a response adds nothing. *)
Lemma X'_group i (Phi : {ffun 'I_G -> bool} -> R) :
  group_E b (fun o : group A H G => Phi [ffun k => right (o k)] * X' (o i)) = 0.
Proof.
pose factor (e : {ffun 'I_G -> bool}) k w := (right w == e k)%:R * (if k == i then X' w else 1).
transitivity (group_E b (fun o : group A H G => \sum_e Phi e * \prod_(k < G) factor e k (o k))).
  apply: eq_group_E => o; rewrite (bigD1 [ffun k => right (o k)]) //= [X in _ + X]big1 ?addr0.
    congr (_ * _); rewrite (bigD1 i) //= /factor ffunE !eqxx mul1r big1 ?mulr1 // => k /negbTE ->.
    by rewrite ffunE eqxx mulr1.
  move=> e ne_e; have [k ne_k] : exists k, right (o k) != e k.
    apply/existsP; apply: contraR ne_e => /existsPn same; apply/eqP/ffunP => k; rewrite ffunE.
    by have := same k; rewrite negbK => /eqP.
  by rewrite (bigD1 k) //= /factor (negbTE ne_k) !mul0r mulr0.
rewrite group_E_sum big1 // => e _; rewrite group_E_scale group_E_prod (bigD1 i) //=.
by rewrite /factor eqxx X'_given mul0r mulr0.
Qed.

(* E of the normalized estimate is c E [R X] with c = E [(1/std) m (1 - m)] / (p (1 - p)), m the group's mean. X can be
   replaced by its mean given the reward, D (R - p) / (p (1 - p)); and the mean over i of (R_i - m) (R_i - p) is
   m (1 - m). *)
Theorem claim_6_std_binary : (0 < G)%N ->
  group_E b std_estimate =
  group_E b (fun o => inverse_std (successes o) * (mean o * (1 - mean o))) / (p * (1 - p)) * D.
Proof.
move=> G_gt0; have [p0 p1] := p_neq01; have G_neq0 : G%:R != 0 :> R by rewrite pnatr_eq0 -lt0n.
pose Phi i (e : {ffun 'I_G -> bool}) : R :=
  inverse_std (\sum_(j < G) e j) * ((e i)%:R - G%:R^-1 * \sum_(j < G) (e j)%:R).
have PhiE i (o : group A H G) :
    Phi i [ffun k => right (o k)] = inverse_std (successes o) * (reward (o i) - mean o).
  rewrite /Phi /mean /group_mean /successes ffunE; congr (inverse_std _ * (_ - _ * _)).
    by apply: eq_bigr => j _; rewrite ffunE.
  by apply: eq_bigr => j _; rewrite ffunE.
have spread (o : group A H G) :
    \sum_(i < G) (reward (o i) - mean o) * (reward (o i) - p) = G%:R * (mean o * (1 - mean o)).
  have ring_id (n m q : R) : (1 - m - q) * (n * m) + n * (m * q) = n * (m * (1 - m)) by ring.
  have total : \sum_(i < G) reward (o i) = G%:R * mean o by rewrite /mean /group_mean mulVKf.
  transitivity (\sum_(i < G) ((1 - mean o - p) * reward (o i) + mean o * p)).
    by apply: eq_bigr => i _; rewrite /reward; case: (right _) => /=; ring.
  rewrite big_split /= -mulr_sumr total sumr_const card_ord -(mulr_natl (mean o * p)).
  exact: ring_id.
transitivity (group_E b (fun o => G%:R^-1 * (\sum_(i < G) Phi i [ffun k => right (o k)] * X' (o i)) -
    (- (D / (p * (1 - p)))) * (inverse_std (successes o) * (mean o * (1 - mean o))))); last first.
  rewrite group_E_sub !group_E_scale group_E_sum big1 => [|i _]; last exact: X'_group.
  by rewrite mulr0 sub0r mulNr opprK [LHS]mulrC mulrA mulrAC.
apply: eq_group_E => o; rewrite mulNr opprK.
rewrite -[mean o * (1 - _)](mulKf G_neq0) -spread /std_estimate.
rewrite [inverse_std _ * (_ * _)]mulrCA [D / _ * (_ * _)]mulrCA -mulrDr; congr (_ * _).
rewrite mulrA mulr_sumr -big_split /=; apply: eq_bigr => i _.
by rewrite PhiE /X' /=; ring.
Qed.

(* The factor is not negative: each prompt keeps its direction. *)
Theorem claim_6_std_binary_direction : (0 < G)%N -> (forall k, 0 <= inverse_std k) ->
  0 <= group_E b (fun o => inverse_std (successes o) * (mean o * (1 - mean o))) / (p * (1 - p)).
Proof.
move=> G_gt0 inv_ge0; apply: divr_ge0; last by rewrite mulr_ge0 ?subr_ge0 ?(ltW p_gt0) ?(ltW p_lt1).
apply: sumr_ge0 => o _; rewrite mulr_ge0 ?prodr_ge0 // => [i _|]; first exact: string_prob_ge0.
have G_pos : 0 < G%:R :> R by rewrite ltr0n.
have sum_le : \sum_(j < G) reward (o j) <= G%:R.
  rewrite -[X in _ <= X%:R]card_ord -sumr_const; apply: ler_sum => j _.
  by rewrite /reward; case: (right _); rewrite ?lexx ?ler01.
rewrite mulr_ge0 // /mean /group_mean; apply: mulr_ge0; last rewrite subr_ge0.
  by rewrite mulr_ge0 ?invr_ge0 ?(ltW G_pos) // sumr_ge0 // => j _; rewrite /reward ler0n.
by rewrite mulrC ler_pdivr_mulr // mul1r.
Qed.

End Standardized.
