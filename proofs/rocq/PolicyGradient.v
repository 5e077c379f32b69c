(* The policy gradient, which ratio makes it unbiased under another policy, and what the other ratios estimate.

   First the softmax, whose score is its derivative, and the policy-gradient theorem: the first-order coefficient of the
   objective, a polynomial in the step eps, is E_p[(sum_t g_t) R], and for a score g every term may be centered by what
   is known before its token. Then claim 3: the cumulative ratio with the target policy's advantage has that gradient as
   its expectation under b (3.prop1), the token ratio has another one (3.token, 3.surrogate), and the length-normalized
   ratio is an expectation under a policy between b and pi (3.gspo). Last, what of the paper's Table 1 is a theorem. *)

From mathcomp Require Import all_ssreflect all_algebra ring.
From ctpo Require Import Trees Expectations Gradients SummedGradient.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(* --- the softmax -------------------------------------------------------------------------------------------------- *)

Section Softmax.

Variables (R : realFieldType) (A : finType) (K : eqType) (key : seq A -> K).
Implicit Types (v : K -> A -> R) (p : policy R A) (s : seq A) (k : K) (a : A) (eps : R).

(* The probabilities of a softmax: v k a > 0 is the exponential of the logit of token a in block k. *)
Definition softmax v s a : R := v (key s) a / \sum_(x : A) v (key s) x.

(* The weights after the logit of token a' in block k has moved by log(1 + eps), that is by eps to first order. *)
Definition bump v k a' eps : K -> A -> R := fun j x => v j x * (1 + eps * ((j == k) && (x == a'))%:R).

(* The softmax score has mean 0 at every history, for any policy. *)
Lemma softmax_score_is_score p k a' : is_score p (softmax_score p key k a').
Proof.
move=> s; rewrite /next /softmax_score.
transitivity ((key s == k)%:R * (\sum_a p s a * (a == a')%:R - (\sum_a p s a) * p s a')).
  by rewrite big_distrl -sumrB big_distrr; apply: eq_bigr => a _ /=; ring.
rewrite prob_sum1 mul1r (bigD1 a') //= eqxx mulr1 big1 => [|a /negbTE ->]; last by rewrite mulr0.
by rewrite addr0 subrr mulr0.
Qed.

(* The score is the derivative: moving one logit by log(1 + eps) moves the probability of token a by eps times
   p(a) times its score, up to an exact remainder, eps^2 times a fraction whose denominator is positive. *)
Lemma softmax_derivative v p k a' eps s a :
  (forall j x, 0 < v j x) -> (forall t x, p t x = softmax v t x) -> 0 < 1 + eps ->
  softmax (bump v k a' eps) s a - p s a - eps * (p s a * softmax_score p key k a' s a) =
    - eps ^+ 2 * ((key s == k)%:R * (p s a * p s a' * ((a == a')%:R - p s a') / (1 + eps * p s a'))).
Proof.
move=> v_gt0 p_soft eps_gt; rewrite /softmax_score /softmax /bump; case: (key s == k) => /=; last first.
  have -> : \sum_x v (key s) x * (1 + eps * 0%:R) = \sum_x v (key s) x.
    by apply: eq_bigr => x _; rewrite mulr0 addr0 mulr1.
  by rewrite (p_soft s a) /softmax; ring.
set S := \sum_x v (key s) x.
have S_gt0 : 0 < S.
  by rewrite /S (bigD1 a') //= ltr_paddr // sumr_ge0 // => x _; apply: ltW.
have S' : \sum_x v (key s) x * (1 + eps * (x == a')%:R) = S * (1 + eps * p s a').
  transitivity (S + \sum_x v (key s) x * (eps * (x == a')%:R)).
    by rewrite -big_split; apply: eq_bigr => x _ /=; rewrite mulrDr mulr1.
  rewrite (bigD1 a') //= eqxx big1 => [|x /negbTE ->]; last by rewrite !mulr0.
  rewrite mulr1 addr0 p_soft /softmax -/S; field.
  exact: lt0r_neq0.
have q_ge0 : 0 <= p s a' by exact: prob_ge0.
have q_le1 : p s a' <= 1.
  rewrite -(prob_sum1 p s) (bigD1 a') //= ler_addl sumr_ge0 // => x _; exact: prob_ge0.
have D_gt0 : 0 < 1 + eps * p s a'.
  have -> : 1 + eps * p s a' = (1 - p s a') + (1 + eps) * p s a' by ring.
  have [-> | q_neq0] := eqVneq (p s a') 0; first by rewrite mulr0 addr0 subr0 ltr01.
  have q_gt0 : 0 < p s a' by rewrite lt_def q_neq0.
  by apply: ltr_paddl; rewrite ?subr_ge0 // mulr_gt0.
rewrite S' (p_soft s a) /softmax -/S; field.
by rewrite !lt0r_neq0.
Qed.

(* The fraction is bounded: for eps >= -1/2 it is at most 2. *)
Lemma softmax_remainder p k a' eps s a : - 2%:R^-1 <= eps ->
  `| (key s == k)%:R * (p s a * p s a' * ((a == a')%:R - p s a') / (1 + eps * p s a')) | <= 2%:R.
Proof.
move=> eps_ge; have prob_le1 x : p s x <= 1.
  rewrite -(prob_sum1 p s) (bigD1 x) //= ler_addl sumr_ge0 // => y _; exact: prob_ge0.
have D_ge : 2%:R^-1 <= 1 + eps * p s a'.
  rewrite -subr_ge0; have -> : 1 + eps * p s a' - 2%:R^-1 =
    2%:R^-1 * (1 - p s a') + (eps + 2%:R^-1) * p s a' by field.
  by rewrite addr_ge0 // mulr_ge0 ?invr_ge0 ?ler0n ?subr_ge0 ?prob_le1 ?prob_ge0 // -ler_subl_addr sub0r.
have D_gt0 : 0 < 1 + eps * p s a' by apply: lt_le_trans D_ge; rewrite invr_gt0 ltr0n.
have score_le1 : `|(a == a')%:R - p s a'| <= 1.
  rewrite ler_norml; case: (a == a') => /=.
    rewrite ler_subr_addr ler_subl_addr ler_addl prob_ge0 andbT.
    by apply: le_trans (prob_le1 a'); rewrite ger_addr oppr_le0 ler01.
  by rewrite sub0r ler_opp2 prob_le1 (le_trans _ ler01) // oppr_le0 prob_ge0.
rewrite !normrM normfV [`|1 + _|]gtr0_norm // !(ger0_norm (prob_ge0 _ _ _)).
have -> : `|(key s == k)%:R| = (key s == k)%:R :> R by case: eqP => _; rewrite ?normr0 ?normr1.
have le1 (x y : R) : 0 <= x <= 1 -> 0 <= y <= 2%:R -> 0 <= x * y <= 2%:R.
  move=> /andP[x0 x1] /andP[y0 y2]; rewrite mulr_ge0 //=.
  by apply: le_trans y2; rewrite ler_pimull.
have inv_le2 : 0 <= (1 + eps * p s a')^-1 <= 2%:R.
  rewrite invr_ge0 ltW //= -[X in _ <= X]invrK lef_pinv //; by rewrite posrE invr_gt0 ltr0n.
suff /andP[] : 0 <= (key s == k)%:R * (p s a * p s a' * `|(a == a')%:R - p s a'| / (1 + eps * p s a')) <= 2%:R.
  by [].
apply: (le1); first by case: eqP; rewrite ?lexx ?ler01.
by rewrite -!mulrA; do 2![apply: (le1); first by rewrite prob_ge0 prob_le1]; apply: (le1); rewrite // normr_ge0.
Qed.

End Softmax.

(* --- the policy-gradient theorem ---------------------------------------------------------------------------------- *)

Section PolicyGradient.

Variables (R : realFieldType) (A : finType) (p : policy R A) (g : seq A -> A -> R).
Implicit Types (s w : seq A) (X : seq A -> {poly R}).

(* Expectations of polynomials: the value at eps = 0, and the derivative by the product rule along the string. *)
Lemma coef0_E n s X : (E (moved p g) n s X)`_0 = E p n s (fun w => (X w)`_0).
Proof.
elim: n s => //= n IHn s; rewrite coef_sum; apply: eq_bigr => a _.
by rewrite coef0M IHn (coef_moved p g s a).1.
Qed.

Lemma coef1_E n s X :
  (E (moved p g) n s X)`_1 = E p n s (fun w => (X w)`_1 + (path_sum g w - path_sum g s) * (X w)`_0).
Proof.
elim: n s => [|n IHn] s /=; first by rewrite subrr mul0r addr0.
rewrite coef_sum; apply: eq_bigr => a _.
rewrite coef1M IHn coef0_E (coef_moved p g s a).1 (coef_moved p g s a).2 -mulrA -mulrDr; congr (_ * _).
rewrite -E_scale -E_add; apply: eq_E => u _; rewrite path_sum_rcons /=; ring.
Qed.

(* The policy-gradient theorem, for every direction g: the derivative of J is E_p[(sum_t g_t) R]. *)
Theorem policy_gradient H reward : gradient p g H reward = E p H [::] (fun w => path_sum g w * reward w).
Proof.
rewrite /gradient coef1_E; apply: eq_E => w _.
by rewrite /= !coefC /= path_sum_nil subr0 add0r.
Qed.

Lemma policy_gradient_steps H reward :
  gradient p g H reward = \sum_(t < H) E p H [::] (fun w => step g t w * reward w).
Proof.
rewrite policy_gradient -E_sum; apply: eq_E => w sz_w.
by rewrite (path_sumE g sz_w) big_distrl.
Qed.

(* The reward of the string may be replaced by its conditional expectation, the action value (any g). *)
Lemma E_step_action_value H t reward : (t < H)%N ->
  E p H [::] (fun w => step g t w * reward w) =
    E p H [::] (fun w => step g t w * step (action_value H reward p) t w).
Proof. by move=> lt_tH; rewrite -E_action_value // -?E_split // => w _; rewrite step_take. Qed.

Lemma policy_gradient_action_value H reward :
  gradient p g H reward = \sum_(t < H) E p H [::] (fun w => step g t w * step (action_value H reward p) t w).
Proof. by rewrite policy_gradient_steps; apply: eq_bigr => t _; apply: E_step_action_value. Qed.

(* For a score, what is known before the token may be subtracted: causality. *)
Hypothesis score : is_score p g.

Lemma E_baseline H t (B : seq A -> R) Y : (t < H)%N ->
  E p H [::] (fun w => step g t w * (Y w - B (take t w))) = E p H [::] (fun w => step g t w * Y w).
Proof.
move=> lt_tH; rewrite -[RHS]subr0 -(E_centered (X := fun w => B (take t w)) lt_tH score) => [|w _].
  by rewrite -E_sub; apply: eq_E => w _; rewrite mulrBr [_ * B _]mulrC.
by rewrite take_take.
Qed.

Lemma policy_gradient_baseline H reward (B : nat -> seq A -> R) :
  gradient p g H reward = \sum_(t < H) E p H [::] (fun w => step g t w * (reward w - B t (take t w))).
Proof. by rewrite policy_gradient_steps; apply: eq_bigr => t _; rewrite E_baseline. Qed.

Lemma policy_gradient_advantage H reward :
  gradient p g H reward = \sum_(t < H) E p H [::] (fun w => step g t w * step (advantage H reward p) t w).
Proof.
rewrite policy_gradient_action_value; apply: eq_bigr => t _.
rewrite -(E_baseline (value H reward p)) //; apply: eq_E => w /= sz_w.
by rewrite step_advantage ?sz_w.
Qed.

End PolicyGradient.

(* --- the first-order coefficient is the derivative ----------------------------------------------------------------- *)

(* Policies q eps that agree with p + eps p g up to C eps^2 have expectations that agree with E_p[X] and its derivative
   up to K eps^2, at every history: the product rule along the string, the remainders collected token by token. *)
Section FirstOrder.

Variables (R : realFieldType) (A : finType) (p : policy R A) (g : seq A -> A -> R).
Variables (q : R -> seq A -> A -> R) (C : R).
Hypothesis q_near : forall eps s a, `|eps| <= 2%:R^-1 ->
  `|q eps s a - p s a - eps * (p s a * g s a)| <= C * eps ^+ 2.

Lemma E_first_order n s (X : seq A -> R) : exists K, forall eps, `|eps| <= 2%:R^-1 ->
  `|E (q eps) n s X - E p n s X - eps * E p n s (fun w => (path_sum g w - path_sum g s) * X w)| <= K * eps ^+ 2.
Proof.
elim: n s => [|n IHn] s /=.
  by exists 0 => eps _; rewrite !subrr mul0r mulr0 subrr normr0 mul0r.
have [K near] := fin_all_exists (fun a => IHn (rcons s a)).
pose D a := E p n (rcons s a) (fun w => (path_sum g w - path_sum g (rcons s a)) * X w).
pose V a := E p n (rcons s a) X.
exists (\sum_a (C * (`|V a| + `|D a| + `|K a|) + (`|p s a * g s a| + p s a) * `|K a| + `|p s a * g s a * D a|)).
move=> eps eps_le.
have eps_le1 : `|eps| <= 1 by apply: le_trans eps_le _; rewrite invf_le1 ?ler1n ?ltr0n.
rewrite big_distrr -!sumrB big_distrl /=; apply: le_trans (ler_norm_sum _ _ _) _; apply: ler_sum => a _.
have -> : E p n (rcons s a) (fun w => (path_sum g w - path_sum g s) * X w) = D a + g s a * V a.
  rewrite /D /V -E_scale -E_add; apply: eq_E => w _; rewrite path_sum_rcons; ring.
have {near} := near a eps eps_le; rewrite -/(D a) -/(V a).
set z := E (q eps) n (rcons s a) X => near_z.
pose r := q eps s a - p s a - eps * (p s a * g s a).
have near_q : `|r| <= C * eps ^+ 2 by exact: q_near.
have -> : q eps s a * z - p s a * V a - eps * (p s a * (D a + g s a * V a)) =
    r * (V a + eps * D a + (z - V a - eps * D a)) + (eps * (p s a * g s a) + p s a) * (z - V a - eps * D a)
      + p s a * g s a * D a * eps ^+ 2 by rewrite /r; ring.
have near_K : `|z - V a - eps * D a| <= `|K a| * eps ^+ 2.
  by apply: le_trans near_z _; rewrite ler_wpmul2r ?sqr_ge0 ?ler_norm.
have near_K1 : `|z - V a - eps * D a| <= `|K a|.
  apply: le_trans near_K _; rewrite ler_pimulr // -real_normK ?num_real //.
  by rewrite exprn_ile1.
have near_D : `|eps * D a| <= `|D a| by rewrite normrM ler_pimull.
have near_p : `|eps * (p s a * g s a) + p s a| <= `|p s a * g s a| + p s a.
  by rewrite (le_trans (ler_norm_add _ _)) // normrM (ger0_norm (prob_ge0 _ _ _)) ler_add2r ler_pimull.
rewrite [X in _ <= X]mulrDl [X in _ <= X + _]mulrDl.
apply: le_trans (ler_norm_add _ _) _; apply: ler_add; last by rewrite normrM (ger0_norm (sqr_ge0 _)).
apply: le_trans (ler_norm_add _ _) _; apply: ler_add; rewrite normrM.
  rewrite mulrAC; apply: ler_pmul => //.
  by do 2![apply: le_trans (ler_norm_add _ _) _; apply: ler_add => //].
by rewrite -mulrA; apply: ler_pmul.
Qed.

Theorem policy_gradient_first_order H reward : exists K, forall eps, `|eps| <= 2%:R^-1 ->
  `|E (q eps) H [::] reward - objective H reward p - eps * gradient p g H reward| <= K * eps ^+ 2.
Proof.
have [K near] := E_first_order H [::] reward; exists K => eps /near.
rewrite policy_gradient; congr (`|_ - _ * _| <= _); apply: eq_E => w _.
by rewrite path_sum_nil subr0.
Qed.

End FirstOrder.

(* The gradient of 3.prop1 is the derivative of J: move one logit of a softmax by log(1 + eps), and J moves by eps times
   the gradient in the direction of that logit's score, up to K eps^2. *)
Theorem claim_3_prop1_derivative (R : realFieldType) (A : finType) (K : eqType) (key : seq A -> K) (v : K -> A -> R)
    (p : policy R A) k a' H reward :
  (forall j x, 0 < v j x) -> (forall s a, p s a = softmax key v s a) ->
  exists C, forall eps, `|eps| <= 2%:R^-1 ->
    `|E (softmax key (bump v k a' eps)) H [::] reward - objective H reward p
        - eps * gradient p (softmax_score p key k a') H reward| <= C * eps ^+ 2.
Proof.
move=> v_gt0 p_soft; apply: (policy_gradient_first_order (C := 2%:R)) => eps s a.
rewrite ler_norml => /andP[eps_ge _].
have eps_gt : 0 < 1 + eps.
  rewrite -subr_gt0 subr0 -[eps]opprK subr_gt0 (le_lt_trans (y := 2%:R^-1)) //; first by rewrite ler_oppl.
  by rewrite invf_lt1 ?ltr1n ?ltr0n.
rewrite softmax_derivative // mulNr normrN normrM (ger0_norm (sqr_ge0 _)) mulrC ler_wpmul2r ?sqr_ge0 //.
exact: softmax_remainder.
Qed.

(* --- claim 3.prop1: the cumulative ratio -------------------------------------------------------------------------- *)

Section CumulativeRatio.

Variables (R : realFieldType) (A : finType) (b pi : policy R A).
Hypothesis AC : absolutely_continuous b pi.
Implicit Types (f g : seq A -> A -> R) (X : seq A -> R).

(* Prop 1: E_b[rho_t f] = E_pi[f] for every function f of the first t tokens; g_t A_t is one, whatever A_t does with
   those tokens. Change of measure on the first t tokens; the rest of the string sums to 1. *)
Theorem claim_3_prop1 H t X : (t <= H)%N ->
  E b H [::] (fun w => rho b pi (take t w) * X (take t w)) = E pi H [::] (fun w => X (take t w)).
Proof. by move=> le_tH; apply: E_rho_prefix. Qed.

(* The lookahead ratio reaches N tokens beyond the one that it weighs: N = 0 is the cumulative ratio, N >= H - 1 the
   sequence ratio rho_H. *)
Definition reach H N t : nat := minn (t.+1 + N) H.

Lemma lt_reach H N t : (t < H)%N -> (t < reach H N t <= H)%N.
Proof. by move=> lt_tH; rewrite geq_minr andbT leq_min lt_tH ltnS leq_addr. Qed.

(* T1.grid, A^pi: every weight that has all factors up to its own token (cumulative, lookahead, sequence ratio) gives
   the policy gradient. *)
Theorem claim_T1_grid_target_advantage H N reward g : is_score pi g ->
  \sum_(t < H) E b H [::] (fun w =>
    rho b pi (take (reach H N t) w) * (step g t w * step (advantage H reward pi) t w)) = gradient pi g H reward.
Proof.
move=> score; rewrite policy_gradient_advantage //; apply: eq_bigr => t _.
have /andP[lt_t le_H] := lt_reach N (ltn_ord t).
by apply: E_rho_known => // w _; rewrite !step_take.
Qed.

(* T1.grid, outcome reward: a weight that reaches to the end gives it for the reward itself, whatever the reward. *)
Theorem claim_T1_grid_outcome H N reward g : (H <= N.+1)%N ->
  \sum_(t < H) E b H [::] (fun w => rho b pi (take (reach H N t) w) * (step g t w * reward w)) =
    gradient pi g H reward.
Proof.
move=> le_HN; rewrite policy_gradient_steps; apply: eq_bigr => t _.
have -> : reach H N t = H by apply/minn_idPr; apply: leq_trans le_HN _; rewrite addSn ltnS leq_addl.
by rewrite E_rho_known // => w /= sz_w; rewrite [take H w]take_oversize ?sz_w.
Qed.

(* Prop 1, summed: with the exact advantage of the target policy the cumulative ratio gives the policy gradient. *)
Theorem claim_3_prop1_gradient H reward g : is_score pi g ->
  \sum_(t < H) E b H [::] (fun w =>
    rho b pi (take t.+1 w) * (step g t w * step (advantage H reward pi) t w)) = gradient pi g H reward.
Proof.
move=> score; rewrite -(claim_T1_grid_target_advantage H 0 _ score); apply: eq_bigr => t _.
by rewrite /reach addn0 (minn_idPl _).
Qed.

(* The same with Q^pi, minus any baseline that is known before the token. *)
Theorem claim_3_prop1_action_value H reward g (B : nat -> seq A -> R) : is_score pi g ->
  \sum_(t < H) E b H [::] (fun w =>
    rho b pi (take t.+1 w) * (step g t w * (step (action_value H reward pi) t w - B t (take t w)))) =
    gradient pi g H reward.
Proof.
move=> score; rewrite policy_gradient_action_value; apply: eq_bigr => t _.
rewrite -(E_baseline score (B t)) //.
by apply: E_rho_known => // w _; rewrite !step_take ?take_take.
Qed.

(* --- T1: the sequence ratio, and the order of the variances ------------------------------------------------------- *)

(* T1, bias: the cumulative ratio with A^pi has none (3.prop1), nor has the sequence ratio. *)
Theorem claim_T1_sequence H reward g : is_score pi g ->
  \sum_(t < H) E b H [::] (fun w => rho b pi w * (step g t w * step (advantage H reward pi) t w)) =
    gradient pi g H reward.
Proof.
move=> score; rewrite -(claim_T1_grid_target_advantage H H _ score); apply: eq_bigr => t _.
have -> : reach H H t = H by apply/minn_idPr; rewrite leq_addl.
by apply: eq_E => w /= sz_w; rewrite [take H w]take_oversize ?sz_w.
Qed.

(* T1, variance of one token's term: the cumulative ratio's is no larger than the sequence ratio's. *)
Theorem claim_T1_variance_term H t X : (t <= H)%N ->
  Var b H [::] (fun w => rho b pi (take t w) * X (take t w)) <= Var b H [::] (fun w => rho b pi w * X (take t w)).
Proof. by move=> le_tH; apply: Var_rho_le. Qed.

End CumulativeRatio.

(* T1, variance of the summed gradient: where the scores of different tokens are orthogonal (logits of their own for
   each position or prefix) the cross terms drop out of the trace, as claim_5_orthogonal says of orthogonal terms. *)
Section SummedVariance.

Variables (R : realFieldType) (A : finType) (b pi : policy R A) (I : finType) (g : I -> seq A -> A -> R) (H : nat).
Hypothesis AC : absolutely_continuous b pi.
Implicit Type f : seq A -> A -> R.

Definition orthogonal_scores := forall w, size w = H -> forall t u : nat, (t < u < H)%N ->
  \sum_(i : I) step (g i) t w * step (g i) u w = 0.

Hypothesis orthogonal : orthogonal_scores.

Theorem claim_T1_variance_sum f :
  trace_var b H [::] (fun i w => \sum_(t < H) rho b pi (take t.+1 w) * (step (g i) t w * step f t w)) <=
  trace_var b H [::] (fun i w => \sum_(t < H) rho b pi w * (step (g i) t w * step f t w)).
Proof.
pose F i s a := g i s a * f s a.
have prefix : trace_var b H [::] (fun i => prefix_weighted (rho b pi) (F i)) = trace_var b H [::] (fun i w =>
    \sum_(t < H) rho b pi (take t.+1 w) * (step (g i) t w * step f t w)).
  apply: eq_bigr => i _; apply: eq_Var => w /= sz_w.
  by rewrite /prefix_weighted sz_w; apply: eq_bigr => t _; rewrite step_mul.
have sequence : trace_var b H [::] (fun i => sequence_weighted (rho b pi) (F i)) = trace_var b H [::] (fun i w =>
    \sum_(t < H) rho b pi w * (step (g i) t w * step f t w)).
  apply: eq_bigr => i _; apply: eq_Var => w /= sz_w.
  by rewrite /sequence_weighted (path_sumE _ sz_w) big_distrr; apply: eq_bigr => t _; rewrite step_mul.
rewrite -prefix -sequence; apply: claim_5_orthogonal => // t u w sz_w _ lt_tH lt_uH.
have dotE k l : dot F k l w = (\sum_i step (g i) k w * step (g i) l w) * (step f k w * step f l w).
  by rewrite /dot big_distrl; apply: eq_bigr => i _; rewrite -!step_mul mulrACA.
rewrite dotE neq_ltn => /orP[lt_tu | lt_ut]; first by rewrite orthogonal ?lt_tu ?mul0r.
by under eq_bigr do rewrite mulrC; rewrite orthogonal ?lt_ut ?mul0r.
Qed.

End SummedVariance.

(* --- claims 3.token and 3.surrogate: the token ratio -------------------------------------------------------------- *)

Section TokenRatio.

Variables (R : realFieldType) (A : finType) (b pi : policy R A) (H : nat) (reward : seq A -> R).
Variable g : seq A -> A -> R.
Hypothesis AC : absolutely_continuous b pi.
Implicit Types (f : seq A -> A -> R) (X Y : seq A -> R).

(* What the token ratio computes: the history from b, the token from pi. *)
Theorem claim_3_token t f : (t < H)%N ->
  E b H [::] (fun w => step (ratio b pi) t w * step f t w) = E b t [::] (fun s => next pi s (f s)).
Proof.
move=> lt_tH; transitivity (E b H [::] (step (fun s a => ratio b pi s a * f s a) t)).
  by apply: eq_E => w _; rewrite step_mul.
by rewrite E_step //; apply: eq_E_reachable => // s _ reach_s; rewrite /= next_ratio.
Qed.

(* G(s) = sum_a pi(a|s) g(a|s) A^pi(s, a), what a history adds to the policy gradient. *)
Definition mean_score s : R := next pi s (fun a => g s a * advantage H reward pi s a).

(* The bias with the exact A^pi: histories count as often as b meets them, not as often as pi does. *)
Theorem claim_3_token_bias : is_score pi g ->
  \sum_(t < H) E b H [::] (fun w => step (ratio b pi) t w * (step g t w * step (advantage H reward pi) t w))
    - gradient pi g H reward = \sum_(t < H) (E b t [::] mean_score - E pi t [::] mean_score).
Proof.
move=> score; rewrite policy_gradient_advantage // -sumrB; apply: eq_bigr => t _; congr (_ - _).
  rewrite -[RHS](claim_3_token (fun s a => g s a * advantage H reward pi s a)) //.
  by apply: eq_E => w _; rewrite step_mul.
transitivity (E pi H [::] (step (fun s a => g s a * advantage H reward pi s a) t)); last by rewrite E_step.
by apply: eq_E => w _; rewrite step_mul.
Qed.

(* The same bias as a sum over histories, (P_b(s) - P_pi(s)) G(s). *)
Theorem claim_3_token_bias_histories : is_score pi g ->
  \sum_(t < H) E b H [::] (fun w => step (ratio b pi) t w * (step g t w * step (advantage H reward pi) t w))
    - gradient pi g H reward =
  \sum_(t < H) \sum_(s : t.-tuple A) (string_prob b s - string_prob pi s) * mean_score s.
Proof.
move=> score; rewrite claim_3_token_bias //; apply: eq_bigr => t _.
by rewrite !E_strings -sumrB; apply: eq_bigr => s _; rewrite mulrBl.
Qed.

(* And as covariances under b: the token ratio leaves out rho of the history, whose mean is 1. *)
Theorem claim_3_token_bias_covariance : is_score pi g ->
  \sum_(t < H) E b H [::] (fun w => step (ratio b pi) t w * (step g t w * step (advantage H reward pi) t w))
    - gradient pi g H reward = - \sum_(t < H) Cov b t [::] (rho b pi) mean_score.
Proof.
move=> score; rewrite claim_3_token_bias // -sumrN; apply: eq_bigr => t _.
by rewrite /Cov E_rho_times // E_rho // rho_nil mul1r opprB.
Qed.

(* The CPI/TRPO surrogate, up to its constant J(b): b writes the history, the moving policy q the token, and the token
   is worth A^b. As the objective is, it is a polynomial in the step eps of q. *)
Definition surrogate (q : seq A -> A -> {poly R}) : {poly R} :=
  \sum_(t < H) E (fun s a => (b s a)%:P) t [::] (fun s => next q s (fun a => (advantage H reward b s a)%:P)).

Lemma surrogate_slope : (surrogate (moved pi g))`_1 =
  \sum_(t < H) E b t [::] (fun s => next pi s (fun a => g s a * advantage H reward b s a)).
Proof.
rewrite coef_sum; apply: eq_bigr => t _; rewrite coef_E; apply: eq_E => s _.
rewrite coef_sum; apply: eq_bigr => a _.
by rewrite coefMC (coef_moved _ _ _ _).2 mulrA.
Qed.

(* With A^b the token ratio gives the derivative of the surrogate, exactly. *)
Theorem claim_3_surrogate :
  \sum_(t < H) E b H [::] (fun w => step (ratio b pi) t w * (step g t w * step (advantage H reward b) t w)) =
    (surrogate (moved pi g))`_1.
Proof.
rewrite surrogate_slope; apply: eq_bigr => t _.
rewrite -(claim_3_token (fun s a => g s a * advantage H reward b s a)) //.
by apply: eq_E => w _; rewrite step_mul.
Qed.

(* With the reward of the string in place of A^b too: E_b[R | history and token] is Q^b, and V^b of the history is a
   baseline for the token that pi writes. *)
Theorem claim_3_surrogate_return : is_score pi g ->
  \sum_(t < H) E b H [::] (fun w => step (ratio b pi) t w * (step g t w * reward w)) = (surrogate (moved pi g))`_1.
Proof.
move=> score; rewrite surrogate_slope; apply: eq_bigr => t _.
transitivity (E b H [::] (fun w => step (fun s a => ratio b pi s a * g s a) t w * reward w)).
  by apply: eq_E => w _; rewrite mulrA step_mul.
rewrite E_step_times //; apply: eq_E_reachable => // s /= sz_s reach_s.
rewrite -[RHS]addr0 -(mulr0 (value H reward b s)) -(score s) /next big_distrr -big_split.
apply: eq_bigr => a _ /=; rewrite -(b_ratio AC a reach_s) /advantage /action_value /value size_rcons sz_s; ring.
Qed.

(* At the policy that sampled, the surrogate has the slope of the objective. *)
Theorem claim_3_surrogate_on_policy (h : seq A -> A -> R) : is_score b h ->
  (surrogate (moved b h))`_1 = gradient b h H reward.
Proof.
move=> score; rewrite policy_gradient_advantage // coef_sum; apply: eq_bigr => t _.
transitivity (E b H [::] (step (fun s a => h s a * advantage H reward b s a) t)); last first.
  by apply: eq_E => w _; rewrite step_mul.
rewrite coef_E E_step //; apply: eq_E => s _ /=.
by rewrite coef_sum; apply: eq_bigr => a _; rewrite coefMC (coef_moved _ _ _ _).2 mulrA.
Qed.

End TokenRatio.

(* --- claim 3.gspo: the length-normalized ratio -------------------------------------------------------------------- *)

(* Bernoulli's inequality with what is left over: x^(m+1) - 1 - (m+1)(x - 1) >= m (x - 1)^2 for x >= 0. *)
Lemma bernoulli (R : realFieldType) (x : R) m : 0 <= x ->
  m%:R * (x - 1) ^+ 2 <= x ^+ m.+1 - 1 - m.+1%:R * (x - 1).
Proof.
move=> x_ge0; elim: m => [|m IHm]; first by rewrite mul0r expr1 mul1r subrr.
have {}IHm : 0 <= x * (x ^+ m.+1 - 1 - m.+1%:R * (x - 1)).
  by rewrite mulr_ge0 // (le_trans _ IHm) // mulr_ge0 ?ler0n ?sqr_ge0.
rewrite -subr_ge0; apply: le_trans IHm _; rewrite le_eqVlt; apply/predU1P; left.
by rewrite [x ^+ m.+2]exprS; ring.
Qed.

(* Ratios that are 1 on every finished string are 1 all along: the policies agree wherever b can get to. *)
Lemma rho1_same (R : realFieldType) (A : finType) (b pi : policy R A) H s a : absolutely_continuous b pi ->
  (forall w, size w = H -> reachable b w -> rho b pi w = 1) ->
  (size s < H)%N -> reachable b s -> pi s a = b s a.
Proof.
move=> AC rho1; have all1 u : (size u <= H)%N -> reachable b u -> rho b pi u = 1.
  move=> le_uH reach_u; rewrite -(E_rho AC (H - size u) reach_u) -[RHS](E_const b (H - size u) u).
  by apply: eq_E_reachable => // v sz_v reach_v; rewrite rho1 // size_cat sz_v subnKC.
move=> lt_sH reach_s; have [a0 | a_neq0] := eqVneq (b s a) 0; first by rewrite a0 (AC _ _ reach_s a0).
have reach_a : reachable b (rcons s a) by rewrite reachable_rcons reach_s prob_gt0.
have := all1 (rcons s a); rewrite size_rcons rho_rcons (all1 s (ltnW lt_sH)) // mul1r => /(_ lt_sH reach_a).
by rewrite /ratio => /(congr1 ( *%R^~ (b s a))); rewrite divfK // mul1r.
Qed.

(* The root is any function whose power is the ratio, non-negative: the root itself need not exist in the field for
   strings of other lengths. *)
Section LengthNormalized.

Variables (R : realFieldType) (A : finType) (b pi : policy R A) (H : nat) (root : seq A -> R).
Hypothesis AC : absolutely_continuous b pi.
Hypothesis H_gt0 : (0 < H)%N.
Hypothesis root_ge0 : forall w, size w = H -> 0 <= root w.
Hypothesis root_power : forall w, size w = H -> root w ^+ H = rho b pi w.
Implicit Types (X : seq A -> R).

(* Z, the mean of the root, and q, the probabilities b * rho^(1/H) / Z. *)
Definition scale : R := E b H [::] root.
Definition tilted w : R := string_prob b w * root w / scale.

Lemma scale_gt0 : 0 < scale.
Proof.
rewrite lt_def E_ge0_reachable => [|w sz_w _]; last exact: root_ge0.
rewrite andbT; apply/eqP => Z0; suff : E b H [::] (rho b pi) = 0 by rewrite E_rho // rho_nil => /eqP; rewrite oner_eq0.
rewrite -[RHS](E0 b H [::]); apply: eq_E_reachable => // w sz_w reach_w.
by rewrite -root_power // (E_eq0_reachable (fun w sz_w _ => root_ge0 sz_w) Z0) // expr0n eqn0Ngt H_gt0.
Qed.

(* The weight rho_H^(1/H) gives Z E_q[X] for every function X of the string. *)
Theorem claim_3_gspo X :
  E b H [::] (fun w => root w * X w) = scale * \sum_(w : H.-tuple A) tilted w * X w.
Proof.
rewrite E_strings big_distrr; apply: eq_bigr => w _ /=; rewrite /tilted.
by field; rewrite lt0r_neq0 // scale_gt0.
Qed.

(* The same for a prefix: as many tokens may follow as one likes. With rho_t^(1/t) this is the cumulative mean. *)
Theorem claim_3_gspo_prefix T X : (H <= T)%N ->
  E b T [::] (fun w => root (take H w) * X (take H w)) = scale * \sum_(w : H.-tuple A) tilted w * X w.
Proof. by move=> le_HT; rewrite -claim_3_gspo -(E_prefix b (fun s => root s * X s) le_HT). Qed.

(* q is a probability distribution over the strings. *)
Theorem claim_3_gspo_distribution :
  (forall w : H.-tuple A, 0 <= tilted w) /\ \sum_(w : H.-tuple A) tilted w = 1.
Proof.
split=> [w|]; first by rewrite /tilted divr_ge0 ?(ltW scale_gt0) // mulr_ge0 ?string_prob_ge0 ?root_ge0 ?size_tuple.
by rewrite -big_distrl -E_strings -/scale /= divff // lt0r_neq0 // scale_gt0.
Qed.

(* q lies 1/H of the way from b to pi: q^H is b^(H-1) pi, up to the constant Z^H. *)
Theorem claim_3_gspo_way (w : H.-tuple A) :
  (scale * tilted w) ^+ H = string_prob b w ^+ H.-1 * string_prob pi w.
Proof.
have -> : scale * tilted w = string_prob b w * root w.
  by rewrite /tilted mulrCA mulrA; field; rewrite lt0r_neq0 // scale_gt0.
have expr_pred x : x ^+ H = x ^+ H.-1 * x by rewrite -exprSr prednK.
rewrite exprMn root_power ?size_tuple // expr_pred -mulrA; congr (_ * _).
have [reach_w | ] := boolP (reachable b w); first by rewrite rho_string_prob // mulrC divfK // lt0r_neq0.
by move=> none; rewrite (unreachable none) mul0r (@unreachable _ _ pi) // (contra _ none) //; apply: reachable_AC.
Qed.

(* Z <= 1: H rho^(1/H) <= H - 1 + rho by Bernoulli's inequality, and E_b rho = 1. *)
Lemma E_gap : E b H [::] (fun w => rho b pi w - 1 - H%:R * (root w - 1)) = H%:R * (1 - scale).
Proof. by rewrite !E_sub E_scale E_sub !E_const E_rho // rho_nil subrr sub0r -mulrN opprB. Qed.

Lemma gap_ge w : size w = H -> H.-1%:R * (root w - 1) ^+ 2 <= rho b pi w - 1 - H%:R * (root w - 1).
Proof.
move=> sz_w; rewrite -root_power // -[in X in _ <= X](prednK H_gt0).
by apply: bernoulli; rewrite root_ge0.
Qed.

Lemma gap_ge0 w : size w = H -> reachable b w -> 0 <= rho b pi w - 1 - H%:R * (root w - 1).
Proof. by move=> sz_w _; apply: le_trans (gap_ge sz_w); rewrite mulr_ge0 ?ler0n ?sqr_ge0. Qed.

Theorem claim_3_gspo_scale : scale <= 1.
Proof.
rewrite -subr_ge0 -(pmulr_rge0 _ (_ : 0 < H%:R)) ?ltr0n // -E_gap.
exact: E_ge0_reachable gap_ge0.
Qed.

(* Z < 1 as soon as there are two tokens and the policies differ somewhere that b can get to. *)
Theorem claim_3_gspo_scale_strict s a :
  (1 < H)%N -> (size s < H)%N -> reachable b s -> pi s a != b s a -> scale < 1.
Proof.
move=> H_gt1 lt_sH reach_s neq; rewrite lt_neqAle claim_3_gspo_scale andbT; apply: contra neq => /eqP Z1.
apply/eqP/(rho1_same _ AC _ lt_sH) => // w sz_w reach_w.
have gap0 : rho b pi w - 1 - H%:R * (root w - 1) = 0.
  by apply: (E_eq0_reachable gap_ge0) => //; rewrite E_gap Z1 subrr mulr0.
suff /eqP : root w = 1 by rewrite -root_power // => /eqP ->; rewrite expr1n.
have := gap_ge sz_w; rewrite gap0 pmulr_rle0 ?ltr0n -?subn1 ?subn_gt0 // => le0.
have : (root w - 1) ^+ 2 == 0 by rewrite eq_le le0 sqr_ge0.
by rewrite sqrf_eq0 subr_eq0 => /eqP.
Qed.

End LengthNormalized.
