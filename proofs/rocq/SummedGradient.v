(* The variance of a summed gradient.

   Token t + 1 contributes the vector f_t, a function of the tokens up to and including it: its advantage times its
   score. The two estimators are Y = sum_t rho_{t+1} f_t, each term with the cumulative ratio of its prefix, and
   Z = rho_H sum_t f_t, with the ratio of the sequence. Both have the same mean. Here: what Var Z - Var Y is; that the
   total variance of Y is the smaller one when the terms of different tokens are orthogonal; that Z can have variance 0;
   and the slope of Var Z - Var Y where the target leaves the behavior policy. *)

From mathcomp Require Import all_ssreflect all_algebra ring.
From ctpo Require Import Trees Expectations Gradients.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(* --- the two estimators ------------------------------------------------------------------------------------------- *)

Section Estimators.

Variables (S : comRingType) (A : finType).
Implicit Types (f : seq A -> A -> S) (rho w : seq A).

(* Y = sum_t rho_{t+1} f_t and Z = rho_H sum_t f_t, for weights rho of strings. *)
Definition prefix_weighted (rho : seq A -> S) f w : S := \sum_(t < size w) rho (take t.+1 w) * step f t w.
Definition sequence_weighted (rho : seq A -> S) f w : S := rho w * path_sum f w.

(* All that the identity needs of the weights: they are a martingale, E[rho_H X] = E[rho_t X] for X known at t. *)
Variables (p : seq A -> A -> S) (H : nat) (rho : seq A -> S).
Hypothesis martingale : forall t (X : seq A -> S), (t <= H)%N ->
  E p H [::] (fun w => rho w * X (take t w)) = E p H [::] (fun w => rho (take t w) * X (take t w)).

Lemma prefix_weightedE f w : size w = H ->
  prefix_weighted rho f w = \sum_(t < H) rho (take t.+1 w) * step f t (take t.+1 w).
Proof.
move=> sz_w; rewrite /prefix_weighted sz_w.
by apply: eq_bigr => t _; rewrite step_take.
Qed.

Lemma sequence_weightedE f w : size w = H -> sequence_weighted rho f w = \sum_(t < H) rho w * step f t (take t.+1 w).
Proof.
move=> sz_w; rewrite /sequence_weighted /path_sum sz_w big_distrr /=.
by apply: eq_bigr => t _; rewrite step_take.
Qed.

(* Z and Y have the same mean, term by term. *)
Lemma same_mean f : E p H [::] (sequence_weighted rho f) = E p H [::] (prefix_weighted rho f).
Proof.
transitivity (E p H [::] (fun w => \sum_(t < H) rho w * step f t (take t.+1 w))).
  by apply: eq_E => w sz_w; rewrite sequence_weightedE.
transitivity (E p H [::] (fun w => \sum_(t < H) rho (take t.+1 w) * step f t (take t.+1 w))); last first.
  by apply: eq_E => w sz_w; rewrite prefix_weightedE.
by rewrite !E_sum; apply: eq_bigr => t _; rewrite (martingale (step f t)).
Qed.

(* So the difference of the variances is that of the second moments, whose squares are double sums. *)
Lemma Var_difference f :
  Var p H [::] (sequence_weighted rho f) - Var p H [::] (prefix_weighted rho f) =
  \sum_(s < H) \sum_(t < H)
    E p H [::] (fun w => (rho w ^+ 2 - rho (take s.+1 w) * rho (take t.+1 w)) * (step f s w * step f t w)).
Proof.
rewrite /Var same_mean opprB addrA addrNK -E_sub.
under [RHS]eq_bigr => s _ do rewrite -E_sum.
rewrite -E_sum; apply: eq_E => w /= sz_w.
rewrite sequence_weightedE // prefix_weightedE // !expr2 !big_distrlr -sumrB /=.
apply: eq_bigr => s _; rewrite -sumrB; apply: eq_bigr => t _.
by rewrite !step_take //; ring.
Qed.

End Estimators.

(* --- the identity ------------------------------------------------------------------------------------------------- *)

Section Identity.

Variables (R : realFieldType) (A : finType) (b pi : policy R A) (H : nat).
Hypothesis AC : absolutely_continuous b pi.

(* The terms have coordinates in any finite set I of parameters: f i s a is coordinate i of f at token a after s. *)
Variables (I : finType) (f : I -> seq A -> A -> R).

Let Y i := prefix_weighted (rho b pi) (f i).
Let Z i := sequence_weighted (rho b pi) (f i).

(* f_s . f_t, along a string. *)
Definition dot (s t : nat) w : R := \sum_(i : I) step (f i) s w * step (f i) t w.

Lemma rho_martingale t (X : seq A -> R) : (t <= H)%N ->
  E b H [::] (fun w => rho b pi w * X (take t w)) = E b H [::] (fun w => rho b pi (take t w) * X (take t w)).
Proof. by move=> le_tH; rewrite E_rho_times // E_rho_prefix. Qed.

(* Both estimators have the mean E_pi [sum_t f_t]; with the advantages of pi that is its gradient. *)
Theorem claim_5_identity_mean i :
  E b H [::] (Z i) = E pi H [::] (path_sum (f i)) /\ E b H [::] (Y i) = E pi H [::] (path_sum (f i)).
Proof.
rewrite /Y -same_mean; last exact: rho_martingale.
by rewrite /Z /sequence_weighted E_rho_times.
Qed.

(* Var Z - Var Y = sum_{s, t} E_b [(rho_H^2 - rho_{s+1} rho_{t+1}) f_s . f_t], the variances summed over coordinates:
   the means are equal, and the squares of Z and Y are double sums. *)
Theorem claim_5_identity :
  trace_var b H [::] Z - trace_var b H [::] Y =
  \sum_(s < H) \sum_(t < H)
    E b H [::] (fun w => (rho b pi w ^+ 2 - rho b pi (take s.+1 w) * rho b pi (take t.+1 w)) * dot s t w).
Proof.
rewrite /trace_var -sumrB.
under eq_bigr => i _ do rewrite (Var_difference rho_martingale).
rewrite exchange_big; apply: eq_bigr => s _; rewrite exchange_big; apply: eq_bigr => t _ /=.
rewrite -E_sum; apply: eq_E => w _.
by rewrite /dot big_distrr.
Qed.

(* The weight of a pair s = t never lowers it: E_b [(rho_H^2 - rho_t^2) X] >= 0 for any X >= 0 known at t, as rho_H has
   the mean rho_t given t tokens. *)
Theorem claim_5_identity_same_token t (X : seq A -> R) : (t <= H)%N -> (forall w, 0 <= X w) ->
  0 <= E b H [::] (fun w => (rho b pi w ^+ 2 - rho b pi (take t w) ^+ 2) * X (take t w)).
Proof.
move=> le_tH X_ge0; have := E_rho_sqr_le AC le_tH X_ge0; rewrite -subr_ge0 -E_sub => /le_trans; apply.
by rewrite le_eqVlt; apply/predU1P; left; apply: eq_E => w _; rewrite mulrBl.
Qed.

(* --- orthogonal terms --------------------------------------------------------------------------------------------- *)

(* If f_s . f_t = 0 for s != t on every string that b can write, only the pairs s = t are left, and the total variance
   of the prefix-weighted gradient is the smaller one. *)
Theorem claim_5_orthogonal :
  (forall s t w, size w = H -> reachable b w -> (s < H)%N -> (t < H)%N -> s != t -> dot s t w = 0) ->
  trace_var b H [::] Y <= trace_var b H [::] Z.
Proof.
move=> orthogonal; rewrite -subr_ge0 claim_5_identity.
apply: sumr_ge0 => s _; apply: sumr_ge0 => t _.
have [eq_st | ne_st] := eqVneq s t; last first.
  rewrite (@eq_E_reachable _ _ b _ _ _ (fun=> 0)) ?E0 // => w sz_w reach.
  by rewrite orthogonal // mulr0.
rewrite {}eq_st.
have /(claim_5_identity_same_token (ltn_ord t)) : forall w, 0 <= dot t t w.
  by move=> w; apply: sumr_ge0 => i _; rewrite -expr2 sqr_ge0.
rewrite (@eq_E _ _ _ _ _ _
  (fun w => (rho b pi w ^+ 2 - rho b pi (take t.+1 w) * rho b pi (take t.+1 w)) * dot t t w)) //.
move=> w _; rewrite -expr2; congr (_ * _).
by apply: eq_bigr => i _; rewrite !step_take.
Qed.

End Identity.

(* --- tabular softmax policies ------------------------------------------------------------------------------------- *)

Section Tabular.

Variables (R : realFieldType) (A : finType) (b pi : policy R A) (H : nat) (adv : seq A -> A -> R).
Hypothesis AC : absolutely_continuous b pi.

(* f_t = A_t g_t with the score of a softmax whose logits are in blocks K, one for each token of the alphabet. *)
Definition softmax_term (K : finType) (key : seq A -> K) (i : K * A) s a : R :=
  adv s a * softmax_score pi key i.1 i.2 s a.

(* The order of the total variances holds for any advantage of the prefix and its token when histories of different
   lengths use different blocks of logits, as then no two tokens of a string share a parameter. *)
Theorem claim_5_orthogonal_tabular (K : finType) (key : seq A -> K) :
  (forall u v, (size u < H)%N -> (size v < H)%N -> key u = key v -> size u = size v) ->
  trace_var b H [::] (fun i => prefix_weighted (rho b pi) (softmax_term key i)) <=
  trace_var b H [::] (fun i => sequence_weighted (rho b pi) (softmax_term key i)).
Proof.
move=> key_size; apply: (claim_5_orthogonal AC) => s t w sz_w _ lt_s lt_t ne_st.
apply: big1 => -[k a'] _; rewrite /softmax_term /softmax_score /step /=.
case: (drop s w) => [|a v]; first by rewrite mul0r.
case: (drop t w) => [|c u]; first by rewrite mulr0.
have [key_s | _] := eqVneq (key (take s w)) k; last by rewrite !(mul0r, mulr0).
have [key_t | _] := eqVneq (key (take t w)) k; last by rewrite !(mul0r, mulr0).
have szs n : (n < H)%N -> size (take n w) = n by move=> lt_n; rewrite size_takel // sz_w ltnW.
have /eqP[] := ne_st.
by rewrite -(szs _ lt_s) -(szs _ lt_t); apply: key_size; rewrite ?szs // key_s key_t.
Qed.

(* Logits of their own for each position, and for each prefix. *)
Theorem claim_5_orthogonal_position (key := fun s : seq A => inord (size s) : 'I_H.+1) :
  trace_var b H [::] (fun i => prefix_weighted (rho b pi) (softmax_term key i)) <=
  trace_var b H [::] (fun i => sequence_weighted (rho b pi) (softmax_term key i)).
Proof.
apply: claim_5_orthogonal_tabular => u v lt_u lt_v /(congr1 val).
by rewrite /= !inordK // ltnS ltnW.
Qed.

Theorem claim_5_orthogonal_prefix (key := fun s : seq A => insub_bseq H s : {bseq H of A}) :
  trace_var b H [::] (fun i => prefix_weighted (rho b pi) (softmax_term key i)) <=
  trace_var b H [::] (fun i => sequence_weighted (rho b pi) (softmax_term key i)).
Proof.
apply: claim_5_orthogonal_tabular => u v lt_u lt_v /(congr1 val).
by rewrite /= !val_insubd (ltnW lt_u) (ltnW lt_v) => ->.
Qed.

End Tabular.

(* --- zero variance ------------------------------------------------------------------------------------------------ *)

Section ZeroVariance.

Variables (R : realFieldType) (A : finType) (pi : policy R A) (H : nat) (f : seq A -> A -> R).

(* One parameter; F = sum_t f_t, of which Z = rho_H F. If b writes each string in proportion to pi F, then
   rho_H F = (pi / b) F = E_pi F on every string that b can write: Z is a constant. *)
Theorem claim_5_zero_variance (b : policy R A) :
  (forall w, size w = H -> string_prob b w = string_prob pi w * path_sum f w / E pi H [::] (path_sum f)) ->
  (forall w, size w = H -> reachable b w -> sequence_weighted (rho b pi) f w = E pi H [::] (path_sum f)) /\
  Var b H [::] (sequence_weighted (rho b pi) f) = 0.
Proof.
set m := E pi H [::] _ => b_pi_F.
have constant w : size w = H -> reachable b w -> sequence_weighted (rho b pi) f w = m.
  move=> sz_w reach; rewrite /sequence_weighted rho_string_prob //.
  move: (reach); rewrite /reachable (b_pi_F w) // => /lt0r_neq0.
  rewrite !mulf_eq0 invr_eq0 !negb_or -andbA => /and3P[pi_n0 F_n0 m_n0].
  by field; rewrite m_n0 F_n0 pi_n0.
split=> //; rewrite Var_centered -[RHS](E0 b H [::]); apply: eq_E_reachable => // w sz_w reach.
rewrite constant //.
have -> : E b H [::] (sequence_weighted (rho b pi) f) = m.
  by rewrite -[RHS](E_const b H [::] m); apply: eq_E_reachable => // u sz_u reach_u; rewrite constant.
by rewrite subrr expr0n.
Qed.

(* Such a sampler exists when F has one sign (c > 0 or c < 0, for instance 1 or -1) on all strings that pi can write:
   b(a|s) = pi(a|s) M(s a) / M(s), with M(s) the mean of F when pi goes on from s. It can write what pi can. *)
Section Sampler.

Variable c : R.
Hypothesis one_sign : forall w, size w = H -> reachable pi w -> 0 < c * path_sum f w.

Let M s := value H (fun w => c * path_sum f w) pi s.

Lemma M_next s : (size s < H)%N -> M s = \sum_a pi s a * M (rcons s a).
Proof. exact: value_next. Qed.

Lemma M_gt0 s : (size s <= H)%N -> reachable pi s -> 0 < M s.
Proof.
move: {2}(H - size s)%N (erefl (H - size s)%N) => n; elim: n s => [|n IHn] s eq_n le_sH reach.
  have sz_s : size s = H by apply/eqP; rewrite eqn_leq le_sH -subn_eq0 eq_n.
  by rewrite /M /value eq_n /= one_sign.
have lt_sH : (size s < H)%N by rewrite -subn_gt0 eq_n.
have pos a : 0 < pi s a -> 0 < M (rcons s a).
  by move=> a_gt0; apply: IHn; rewrite ?reachable_rcons ?reach // size_rcons // subnS eq_n.
have ge0 a : 0 <= pi s a * M (rcons s a).
  have := prob_ge0 pi s a; rewrite le_eqVlt => /predU1P[<- | a_gt0]; first by rewrite mul0r.
  by rewrite ltW // mulr_gt0 ?pos.
rewrite lt_def M_next // sumr_ge0 // andbT psumr_eq0 //; apply/allPn.
have [a a_neq0] : exists a, pi s a != 0.
  apply/existsP; apply: contraTT isT => /existsPn zero; have /eqP := prob_sum1 pi s.
  by rewrite big1 ?(eq_sym 0) ?oner_eq0 // => a _; apply/eqP; have := zero a; rewrite negbK.
by exists a; rewrite ?mem_index_enum //= mulf_neq0 // lt0r_neq0 // pos // prob_gt0.
Qed.

Definition zero_variance_prob s a := if reachable pi s && (size s < H)%N then pi s a * M (rcons s a) / M s else pi s a.

Lemma zero_variance_ge0 s a : 0 <= zero_variance_prob s a.
Proof.
rewrite /zero_variance_prob; case: andP => [[reach lt_sH] | _]; last exact: prob_ge0.
rewrite mulr_ge0 ?invr_ge0 ?(ltW (M_gt0 (ltnW lt_sH) reach)) //.
have := prob_ge0 pi s a; rewrite le_eqVlt => /predU1P[<- | a_gt0]; first by rewrite mul0r.
by rewrite mulr_ge0 ?(ltW a_gt0) // ltW // M_gt0 ?size_rcons // reachable_rcons reach.
Qed.

Lemma zero_variance_sum1 s : \sum_a zero_variance_prob s a = 1.
Proof.
rewrite /zero_variance_prob; case: andP => [[reach lt_sH] | _]; last exact: prob_sum1.
by rewrite -big_distrl /= -M_next // divff // lt0r_neq0 // M_gt0 // ltnW.
Qed.

Definition zero_variance_policy := Policy zero_variance_ge0 zero_variance_sum1.

Lemma zero_variance_string s : (size s <= H)%N -> string_prob zero_variance_policy s = string_prob pi s * M s / M [::].
Proof.
have M0 : M [::] != 0 by rewrite lt0r_neq0 // M_gt0.
elim/last_ind: s => [|s a IHs]; first by rewrite !string_prob_nil mul1r divff.
rewrite size_rcons => lt_sH; rewrite !string_prob_rcons IHs ?(ltnW lt_sH) //= /zero_variance_prob lt_sH andbT.
case: ifP => [reach | /negbT/unreachable->]; last by rewrite !mul0r.
have Ms : M s != 0 by rewrite lt0r_neq0 // M_gt0 // ltnW.
by field; rewrite M0 Ms.
Qed.

Theorem claim_5_zero_variance_sampler : exists b : policy R A,
  [/\ absolutely_continuous b pi,
      forall w, size w = H -> string_prob b w = string_prob pi w * path_sum f w / E pi H [::] (path_sum f)
    & Var b H [::] (sequence_weighted (rho b pi) f) = 0].
Proof.
have strings w : size w = H ->
    string_prob zero_variance_policy w = string_prob pi w * path_sum f w / E pi H [::] (path_sum f).
  move=> sz_w; rewrite zero_variance_string ?sz_w //.
  have : 0 < M [::] by rewrite M_gt0.
  rewrite {1 3}/M /value subn0 E_scale => /lt0r_neq0; rewrite mulf_eq0 negb_or => /andP[c_n0 m_n0].
  by rewrite {1}/M /value sz_w subnn /=; field; rewrite m_n0 c_n0.
exists zero_variance_policy; split=> //; last by have [] := claim_5_zero_variance strings.
move=> s a reach /=; rewrite /zero_variance_prob; case: andP => [[reach_pi lt_sH] | //] /eqP.
rewrite mulf_eq0 invr_eq0 (negbTE (lt0r_neq0 (M_gt0 (ltnW lt_sH) reach_pi))) orbF mulf_eq0 => /orP[/eqP // | M0].
apply/eqP; apply: contraTT M0 => a_neq0; rewrite lt0r_neq0 // M_gt0 ?size_rcons // reachable_rcons reach_pi.
by rewrite prob_gt0.
Qed.

End Sampler.

End ZeroVariance.

(* --- the slope where the target leaves the behavior policy -------------------------------------------------------- *)

Section Slope.

Variables (R : realFieldType) (A : finType) (b : policy R A) (H : nat).
Implicit Types (s w : seq A).

(* b as polynomials in eps, of order 0. *)
Definition b_poly s a : {poly R} := (b s a)%:P.

(* The target is moved b x, that is b(a|s) (1 + eps x(s, a)), for a direction x of scores: to first order in eps every
   smooth family of policies through b. Its cumulative ratio is a polynomial in eps. *)
Variable x : seq A -> A -> R.
Hypothesis x_score : is_score b x.

Definition rho_moved : seq A -> {poly R} := path_prod (fun s a => 1 + x s a *: 'X).

Lemma moved_b s a : moved b x s a = b_poly s a * (1 + x s a *: 'X).
Proof. by rewrite /moved /b_poly mulrDr mulr1 -scalerA !mul_polyC. Qed.

Lemma rho_moved_coef w : (rho_moved w)`_0 = 1 /\ (rho_moved w)`_1 = path_sum x w.
Proof. by apply: coef_path_prod => s a; rewrite !coefD !coefZ !coefX !coef1 /= ?mulr0 ?mulr1 ?addr0 ?add0r. Qed.

Lemma rho_moved_mean n s : E b_poly n s rho_moved = rho_moved s.
Proof.
elim: n s => //= n IHn s.
under eq_bigr => a _ do rewrite IHn /rho_moved path_prod_rcons mulrCA -moved_b.
rewrite -big_distrr big_split /= -scaler_suml -rmorph_sum /= prob_sum1.
by have := x_score s; rewrite /next => ->; rewrite scale0r addr0 mulr1.
Qed.

Lemma b_poly_const n s (c : {poly R}) : E b_poly n s (fun=> c) = c.
Proof. by apply/polyP => k; rewrite coef_E E_const. Qed.

Lemma rho_moved_martingale t (X : seq A -> {poly R}) : (t <= H)%N ->
  E b_poly H [::] (fun w => rho_moved w * X (take t w)) =
  E b_poly H [::] (fun w => rho_moved (take t w) * X (take t w)).
Proof.
move=> le_tH; rewrite !(E_split _ _ le_tH); apply: eq_E => s /= sz_s.
transitivity (E b_poly (H - t) s (fun w => X s * rho_moved w)).
  by apply: eq_E => u _; rewrite -sz_s take_size_cat // mulrC.
rewrite E_scale rho_moved_mean -[LHS](b_poly_const (H - t) s).
by apply: eq_E => u _; rewrite -sz_s take_size_cat // mulrC.
Qed.

Variables (I : finType) (f : I -> seq A -> A -> {poly R}).

(* f at eps = 0, and f_s . f_t there. *)
Let f0 i s a : R := (f i s a)`_0.
Let dot0 := dot f0.

Lemma later_scores (s t : nat) : (s < H)%N -> (t < H)%N ->
  E b H [::] (fun w => (path_sum x w - path_sum x (take s.+1 w)) * dot0 s t w) =
  \sum_(k < H | (s < k <= t)%N) E b H [::] (fun w => step x k w * dot0 s t w).
Proof.
move=> lt_s lt_t; transitivity (E b H [::] (fun w => \sum_(k < H | (s < k)%N) step x k w * dot0 s t w)).
  apply: eq_E => w /= sz_w; rewrite -big_distrl /=; congr (_ * _); apply/eqP; rewrite subr_eq; apply/eqP.
  rewrite path_sum_take ?sz_w // (big_ord_widen H (fun k => step x k w)) // addrC /path_sum sz_w.
  by rewrite (bigID (fun k : 'I_H => (k < s.+1)%N)) /=; congr (_ + _); apply: eq_bigl => k; rewrite -ltnNge.
rewrite E_sum (bigID (fun k : 'I_H => (k <= t)%N)) /= [X in _ + X]big1 ?addr0 // => k /andP[lt_sk].
rewrite -ltnNge => lt_tk; rewrite -(E_centered (X := dot0 s t) (ltn_ord k) x_score) => [|w _].
  by apply: eq_E => w _; rewrite mulrC.
by apply: eq_bigr => i _; rewrite !step_take.
Qed.

(* The derivative of Var Z - Var Y at eps = 0, the variances summed over coordinates, is
   2 sum_{s < t} sum_{s < k <= t} E_b [x_k f_s . f_t]. The terms f may depend on eps: in the identity they are
   multiplied by rho_H^2 - rho_s rho_t, which is 0 at eps = 0 and there has the slope 2 (x_1 + .. + x_H) -
   (x_1 + .. + x_s) - (x_1 + .. + x_t); and a score later than both terms has mean 0. *)
Theorem claim_5_slope :
  (\sum_(i : I) (Var b_poly H [::] (sequence_weighted rho_moved (f i)) -
                 Var b_poly H [::] (prefix_weighted rho_moved (f i))))`_1 =
  2%:R * \sum_(s < H) \sum_(t < H) \sum_(k < H | (s < k <= t)%N) E b H [::] (fun w => step x k w * dot0 s t w).
Proof.
pose U (s t : 'I_H) := E b H [::] (fun w => (path_sum x w - path_sum x (take s.+1 w)) * dot0 s t w).
transitivity (\sum_(s < H) \sum_(t < H) (U s t + U t s)); last first.
  under eq_bigr => s _ do rewrite big_split /=.
  rewrite big_split /= [X in _ + X]exchange_big /= -mulr2n mulr_natl; congr (_ *+ 2).
  by apply: eq_bigr => s _; apply: eq_bigr => t _; rewrite /U later_scores.
under eq_bigr => i _ do rewrite (Var_difference rho_moved_martingale).
rewrite exchange_big coef_sum; apply: eq_bigr => s _; rewrite exchange_big coef_sum; apply: eq_bigr => t _ /=.
rewrite -E_sum coef_E /U -E_add; apply: eq_E => w _ /=.
rewrite coef_sum /dot0 /dot -[X in _ = _ + _ * X](eq_bigr _ (fun i _ => mulrC _ _)) -mulrDl big_distrr /=.
apply: eq_bigr => i _; have [c0 c1] := rho_moved_coef w.
have [s0 s1] := rho_moved_coef (take s.+1 w); have [t0 t1] := rho_moved_coef (take t.+1 w).
rewrite coef1M !coefB expr2 !coef0M !coef1M c0 s0 t0 c1 s1 t1 !coef_step.
by rewrite /f0; ring.
Qed.

End Slope.
