(* Claim 9: the stop-gradient form of the prefix-weighted loss against the derivative of the formula as printed.

   The printed surrogate sum_t rho_t A_t depends on the parameters through every factor of rho_t; the released code
   holds all factors but the last one constant. Both are polynomials in the step eps of pi here, the advantages held
   constant, and their first-order coefficients are sum_t rho_t A_t sum_{k<=t} g_k and sum_t rho_t A_t g_t, string by
   string. Which of the two has the policy gradient as its expectation under b depends on what A is: both with A^pi,
   only the whole product with A^b, only the stop-gradient form with Q^pi, neither with the reward of the string. *)

From mathcomp Require Import all_ssreflect all_algebra ring.
From ctpo Require Import Trees Expectations Gradients PolicyGradient.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(* --- the two surrogates of a string, and their derivatives -------------------------------------------------------- *)

Section Forms.

Variables (R : realFieldType) (A : finType) (b pi : policy R A) (g : seq A -> A -> R).
Implicit Types (adv : nat -> seq A -> R) (w : seq A).

(* The ratio of a token while pi moves in direction g. *)
Definition moved_ratio s a : {poly R} := (b s a)^-1 *: moved pi g s a.

(* sum_t rho_t A_t as printed: every factor of rho_t moves. adv t w is the advantage of token t + 1 of w, any number. *)
Definition printed adv w : {poly R} := \sum_(t < size w) adv t w *: path_prod moved_ratio (take t.+1 w).

(* The released expression exp(sg[log rho_t] + log pi_t - sg[log pi_t]): only the token's own log-probability moves. *)
Definition released adv w : {poly R} :=
  \sum_(t < size w) (adv t w * rho b pi (take t.+1 w) / step pi t w) *: step (moved pi g) t w.

(* What the two derivatives will be. *)
Definition stop_gradient adv w : R := \sum_(t < size w) rho b pi (take t.+1 w) * adv t w * step g t w.
Definition undetached adv w : R := \sum_(t < size w) rho b pi (take t.+1 w) * adv t w * path_sum g (take t.+1 w).
Definition earlier_tokens adv w : R := \sum_(t < size w) rho b pi (take t.+1 w) * adv t w * path_sum g (take t w).

Lemma coef_moved_ratio w :
  (path_prod moved_ratio w)`_0 = rho b pi w /\ (path_prod moved_ratio w)`_1 = rho b pi w * path_sum g w.
Proof.
elim/last_ind: w => [|w a [IH0 IH1]].
  by rewrite path_prod_nil rho_nil path_sum_nil !coef1 mul1r.
rewrite path_prod_rcons rho_rcons path_sum_rcons coef0M coef1M IH0 IH1 !coefZ.
rewrite (coef_moved pi g w a).1 (coef_moved pi g w a).2 /ratio.
by split; ring.
Qed.

(* The derivative of the printed formula: every token's score, times all later weighted advantages. *)
Theorem claim_9_forms_printed adv w : (printed adv w)`_1 = undetached adv w.
Proof.
rewrite coef_sum; apply: eq_bigr => t _; rewrite coefZ (coef_moved_ratio _).2; ring.
Qed.

(* Only the token's own log-probability moves. *)
Lemma coef_step_moved t w : (step (moved pi g) t w)`_1 = step pi t w * step g t w.
Proof. by rewrite coef_step step_mul /step; case: drop => // a _; apply: (coef_moved _ _ _ _).2. Qed.

(* The derivative of the released expression: each token's score by its own weight. Where pi(a|s) = 0 both are 0. *)
Theorem claim_9_forms_released adv w : (released adv w)`_1 = stop_gradient adv w.
Proof.
rewrite coef_sum; apply: eq_bigr => t _; rewrite coefZ coef_step_moved.
have [pi0 | pi_neq0] := eqVneq (step pi t w) 0; last by field.
suff -> : rho b pi (take t.+1 w) = 0 by ring.
rewrite /rho path_prod_take // big_ord_recr /=; suff -> : step (ratio b pi) t w = 0 by rewrite mulr0.
by move: pi0; rewrite /step; case: (drop t w) => // a _; rewrite /ratio => ->; rewrite mul0r.
Qed.

(* Their difference, string by string: what each token's weight has to say about the tokens before it. *)
Theorem claim_9_forms adv w : (printed adv w)`_1 - (released adv w)`_1 = earlier_tokens adv w.
Proof.
rewrite claim_9_forms_printed claim_9_forms_released -sumrB; apply: eq_bigr => t _.
by rewrite path_sum_takeS ?ltn_ord //; ring.
Qed.

(* --- 9.mean_form: roots ------------------------------------------------------------------------------------------- *)

(* The released second mode, exp(sg[log rho_t / t] + log pi_t - sg[log pi_t]), with root for rho_t^(1/t): its derivative
   is root g_t. *)
Theorem claim_9_mean_form_released (root : R) t w : (t < size w)%N -> step pi t w != 0 ->
  ((root / step pi t w) *: step (moved pi g) t w)`_1 = root * step g t w.
Proof. by move=> _ pi_neq0; rewrite coefZ coef_step_moved; field. Qed.

(* The t-th root of the moving ratio of t tokens, to first order: a polynomial whose t-th power agrees with the ratio up
   to the first-order coefficient. Its derivative is root / t times the sum of the scores, by the chain rule. *)
Theorem claim_9_mean_form_root (P : {poly R}) w : (0 < size w)%N -> rho b pi w != 0 ->
  (P ^+ size w)`_0 = (path_prod moved_ratio w)`_0 ->
  (P ^+ size w)`_1 = (path_prod moved_ratio w)`_1 <-> P`_1 = P`_0 / (size w)%:R * path_sum g w.
Proof.
have coef0X n : (P ^+ n)`_0 = P`_0 ^+ n by elim: n => [|n IHn]; rewrite ?coef1 // !exprS coef0M IHn.
have coef1X n : (P ^+ n.+1)`_1 = n.+1%:R * P`_0 ^+ n * P`_1.
  elim: n => [|n IHn]; first by rewrite !expr1 mulr1 mul1r.
  by rewrite exprS coef1M IHn coef0X [P`_0 ^+ n.+1]exprS; ring.
rewrite (coef_moved_ratio w).1 (coef_moved_ratio w).2.
case: (size w) => // n _ rho_neq0; rewrite coef0X coef1X => root_rho.
have P0_neq0 : P`_0 != 0 by apply: contra rho_neq0 => /eqP P0; rewrite -root_rho P0 exprS mul0r.
have n_neq0 : n.+1%:R != 0 :> R by rewrite pnatr_eq0.
have Pn_neq0 : P`_0 ^+ n != 0 by rewrite expf_neq0.
rewrite -root_rho exprS; move: n_neq0 Pn_neq0; move: (n.+1%:R : R) (P`_0 ^+ n) => m x m_neq0 x_neq0.
split=> [eq1 | ->]; last by field.
by apply: (mulfI (mulf_neq0 m_neq0 x_neq0)); rewrite eq1; field.
Qed.

End Forms.

(* --- expectations under b ----------------------------------------------------------------------------------------- *)

Section Expectations.

Variables (R : realFieldType) (A : finType) (b pi : policy R A) (H : nat) (reward : seq A -> R).
Variable g : seq A -> A -> R.
Hypothesis AC : absolutely_continuous b pi.
Hypothesis score : is_score pi g.
Implicit Types (f : seq A -> A -> R) (V : seq A -> R) (s w : seq A).

(* The expectations of the two forms, for an advantage that is a function of the string. *)
Definition mean_stop_gradient (adv : nat -> seq A -> R) : R := E b H [::] (stop_gradient b pi g adv).
Definition mean_undetached (adv : nat -> seq A -> R) : R := E b H [::] (undetached b pi g adv).

(* The sums over the tokens, one expectation each. *)
Lemma mean_stop_gradientE adv : mean_stop_gradient adv =
  \sum_(t < H) E b H [::] (fun w => rho b pi (take t.+1 w) * adv t w * step g t w).
Proof. by rewrite -E_sum; apply: eq_E => w /= sz_w; rewrite /stop_gradient sz_w. Qed.

Lemma mean_undetachedE adv : mean_undetached adv =
  \sum_(t < H) E b H [::] (fun w => rho b pi (take t.+1 w) * adv t w * path_sum g (take t.+1 w)).
Proof. by rewrite -E_sum; apply: eq_E => w /= sz_w; rewrite /undetached sz_w. Qed.

(* Advantages that are known with their token: the ratio turns b into pi (Prop 1). *)
Lemma mean_undetached_pi f : mean_undetached (step f) =
  E pi H [::] (fun w => \sum_(t < H) step f t w * path_sum g (take t.+1 w)).
Proof.
rewrite mean_undetachedE E_sum; apply: eq_bigr => t _.
rewrite -(E_rho_known AC (ltn_ord t)) => [|w _]; last by rewrite step_take // take_take.
by apply: eq_E => w _; rewrite mulrA.
Qed.

Lemma mean_stop_gradient_pi f : mean_stop_gradient (step f) =
  E pi H [::] (fun w => \sum_(t < H) step f t w * step g t w).
Proof.
rewrite mean_stop_gradientE E_sum; apply: eq_bigr => t _.
rewrite -(E_rho_known AC (ltn_ord t)) => [|w _]; last by rewrite !step_take.
by apply: eq_E => w _; rewrite mulrA.
Qed.

(* Summation by parts: with A_t = V(s_{t+1}) - V(s_t) the whole product is the last value times all scores, less each
   value times the score of its next token. *)
Lemma summation_by_parts V n w : (n <= size w)%N ->
  \sum_(t < n) (V (take t.+1 w) - V (take t w)) * path_sum g (take t.+1 w) =
    path_sum g (take n w) * V (take n w) - \sum_(t < n) step g t w * V (take t w).
Proof.
elim: n => [|n IHn] le_nw; first by rewrite !big_ord0 take0 path_sum_nil mul0r subr0.
rewrite !big_ord_recr /= IHn ?(ltnW le_nw) // path_sum_takeS //.
by set past := \sum_(t < n) _; ring.
Qed.

(* So with the differences of any function V of the history that ends at the reward, whatever V is before the end, the
   whole product is unbiased: each V(s_t) is a baseline of token t + 1. *)
Lemma undetached_any_value V f :
  (forall w, size w = H -> V w = reward w) ->
  (forall s a, (size s < H)%N -> f s a = V (rcons s a) - V s) ->
  mean_undetached (step f) = gradient pi g H reward.
Proof.
move=> V_end f_diff; rewrite mean_undetached_pi policy_gradient.
have f_step t w : (t < H)%N -> size w = H -> step f t w = V (take t.+1 w) - V (take t w).
  move=> lt_tH sz_w; have [|a [-> ->]] := @take_step R A t w; first by rewrite sz_w.
  by rewrite f_diff // size_takel // sz_w ltnW.
transitivity (E pi H [::] (fun w => path_sum g w * reward w - \sum_(t < H) step g t w * V (take t w))).
  apply: eq_E => w /= sz_w; under eq_bigr => t _ do rewrite f_step //.
  by rewrite summation_by_parts ?sz_w // take_oversize ?sz_w // V_end.
rewrite E_sub E_sum big1 ?subr0 // => t _; rewrite -[RHS](E_centered (X := fun w => V (take t w)) (ltn_ord t) score).
  by apply: eq_E => w _; rewrite mulrC.
by move=> w _; rewrite take_take.
Qed.

(* --- 9.target_advantage and 9.behavior_advantage ------------------------------------------------------------------ *)

(* With A^pi, the advantage of the policy that is trained, both forms are unbiased: E_pi[A^pi | s_t] = 0, so the scores
   of earlier tokens add nothing. *)
Theorem claim_9_target_advantage :
  mean_stop_gradient (step (advantage H reward pi)) = gradient pi g H reward /\
  mean_undetached (step (advantage H reward pi)) = gradient pi g H reward.
Proof.
split; last first.
  by apply: (undetached_any_value (V := value H reward pi)) => // w sz_w; rewrite /value sz_w subnn.
rewrite mean_stop_gradient_pi E_sum policy_gradient_advantage //; apply: eq_bigr => t _.
by apply: eq_E => w _; rewrite mulrC.
Qed.

(* With the advantage of any policy p the whole product is unbiased: the differences of V^p end at the reward. *)
Theorem claim_9_behavior_advantage_any_policy (p : policy R A) :
  mean_undetached (step (advantage H reward p)) = gradient pi g H reward.
Proof. by apply: (undetached_any_value (V := value H reward p)) => // w sz_w; rewrite /value sz_w subnn. Qed.

(* With A^b it is thus exact: the derivative of the performance-difference lemma, J(pi) = J(b) + E_pi[sum_t A^b_t]. *)
Theorem claim_9_behavior_advantage_undetached :
  mean_undetached (step (advantage H reward b)) = gradient pi g H reward.
Proof. exact: claim_9_behavior_advantage_any_policy. Qed.

(* The stop-gradient form with A^b leaves out how earlier tokens change which histories come. *)
Theorem claim_9_behavior_advantage_bias :
  mean_stop_gradient (step (advantage H reward b)) - gradient pi g H reward =
    - E pi H [::] (fun w => \sum_(t < H) step (advantage H reward b) t w * path_sum g (take t w)).
Proof.
rewrite -claim_9_behavior_advantage_undetached mean_undetached_pi mean_stop_gradient_pi -E_sub -E_opp.
apply: eq_E => w /= sz_w; rewrite -sumrB -sumrN; apply: eq_bigr => t _.
by rewrite path_sum_takeS ?sz_w //; ring.
Qed.

(* --- 9.outcome and 9.action_value --------------------------------------------------------------------------------- *)

(* With the reward in place of the advantage both forms are what they are with Q^b ... *)
Lemma outcome_is_action_value (X : nat -> seq A -> R) :
  \sum_(t < H) E b H [::] (fun w => rho b pi (take t.+1 w) * reward w * X t (take t.+1 w)) =
  \sum_(t < H) E b H [::] (fun w =>
    rho b pi (take t.+1 w) * step (action_value H reward b) t w * X t (take t.+1 w)).
Proof.
apply: eq_bigr => t _; pose Y w := rho b pi (take t.+1 w) * X t (take t.+1 w).
transitivity (E b H [::] (fun w => Y w * reward w)); first by apply: eq_E => w _; rewrite /Y mulrAC.
rewrite (E_split b _ (ltn_ord t)) E_action_value // => [|w _]; last by rewrite /Y !take_take.
by apply: eq_E => w _; rewrite /Y mulrAC.
Qed.

Lemma mean_stop_gradient_reward :
  mean_stop_gradient (fun=> reward) = mean_stop_gradient (step (action_value H reward b)).
Proof.
rewrite !mean_stop_gradientE; have := outcome_is_action_value (step g).
rewrite (eq_bigr (fun t : 'I_H => E b H [::] (fun w => rho b pi (take t.+1 w) * reward w * step g t w))) => [->|t _].
  by apply: eq_bigr => t _; apply: eq_E => w _; rewrite step_take.
by apply: eq_E => w _; rewrite step_take.
Qed.

(* ... so the whole product counts too much: the score of every token once for each later one, times Q^b. *)
Theorem claim_9_outcome_undetached :
  mean_undetached (fun=> reward) =
    E pi H [::] (fun w => \sum_(t < H) step (action_value H reward b) t w * path_sum g (take t.+1 w)).
Proof. by rewrite -mean_undetached_pi !mean_undetachedE (outcome_is_action_value (fun=> path_sum g)). Qed.

(* And the stop-gradient form is the one with A^b, bias included: V^b(s_t) is a baseline. *)
Theorem claim_9_outcome_stop_gradient :
  mean_stop_gradient (fun=> reward) = mean_stop_gradient (step (advantage H reward b)).
Proof.
rewrite mean_stop_gradient_reward !mean_stop_gradient_pi !E_sum; apply: eq_bigr => t _.
transitivity (E pi H [::] (fun w => step g t w * step (action_value H reward b) t w)).
  by apply: eq_E => w _; rewrite mulrC.
rewrite -(E_baseline score (value H reward b)) //; apply: eq_E => w /= sz_w.
by rewrite step_advantage ?sz_w // mulrC.
Qed.

(* What a constant c as the advantage does while the string is live (live s = 1 while tokens are trained on, 0 after its
   end; it is known before the token): nothing to the stop-gradient form, but it moves the whole product ... *)
Theorem claim_9_outcome_constant (c : R) (live : seq A -> R) :
  mean_stop_gradient (fun t w => c * live (take t w)) = 0 /\
  mean_undetached (fun t w => c * live (take t w)) =
    c * E pi H [::] (fun w => \sum_(t < H) live (take t w) * path_sum g (take t w)).
Proof.
have centered t : (t < H)%N -> E pi H [::] (fun w => live (take t w) * step g t w) = 0.
  by move=> lt_tH; apply: (E_centered lt_tH score) => w _; rewrite take_take.
pose f s (a : A) := c * live s.
have f_step t w : (t < size w)%N -> step f t w = c * live (take t w).
  by move=> /(@take_step R) [a [_ ->]].
split.
  transitivity (mean_stop_gradient (step f)).
    rewrite !mean_stop_gradientE; apply: eq_bigr => t _; apply: eq_E => w /= sz_w.
    by rewrite f_step // sz_w.
  rewrite mean_stop_gradient_pi E_sum big1 // => t _.
  rewrite -[RHS](mulr0 c) -(centered t) // -E_scale; apply: eq_E => w /= sz_w.
  by rewrite f_step ?sz_w //; ring.
transitivity (mean_undetached (step f)).
  rewrite !mean_undetachedE; apply: eq_bigr => t _; apply: eq_E => w /= sz_w.
  by rewrite f_step // sz_w.
rewrite mean_undetached_pi !E_sum big_distrr; apply: eq_bigr => t _.
transitivity (c * E pi H [::] (fun w => live (take t w) * path_sum g (take t w)) +
  c * E pi H [::] (fun w => live (take t w) * step g t w)); last by rewrite centered // mulr0 addr0.
rewrite -!E_scale -E_add; apply: eq_E => w /= sz_w.
by rewrite f_step ?sz_w // path_sum_takeS ?sz_w //; ring.
Qed.

(* ... unless all strings have the same length. *)
Theorem claim_9_outcome_constant_one_length (c : R) : mean_undetached (fun _ _ => c) = 0.
Proof.
transitivity (mean_undetached (fun _ _ => c * 1)); first by rewrite mulr1.
rewrite (claim_9_outcome_constant c (fun=> 1)).2 E_sum big1 ?mulr0 // => t _.
rewrite (eq_E _ (Y := fun w => path_sum g (take t w))) => [|w _]; last by rewrite mul1r.
by rewrite (E_prefix pi (path_sum g) (ltnW (ltn_ord t))) E_score.
Qed.

(* With Q^pi, less any baseline that is known before the token, the stop-gradient form is exact. *)
Theorem claim_9_action_value_stop_gradient (B : nat -> seq A -> R) :
  mean_stop_gradient (fun t w => step (action_value H reward pi) t w - B t (take t w)) = gradient pi g H reward.
Proof.
rewrite mean_stop_gradientE -(claim_3_prop1_action_value AC H reward B score); apply: eq_bigr => t _.
by apply: eq_E => w _; ring.
Qed.

(* The whole product is not: a token's score meets the reward, less the baseline, once for every token from it on. With
   the reward before token t + 1 as B t that is what is earned from there on. *)
Theorem claim_9_action_value_undetached (B : nat -> seq A -> R) :
  mean_undetached (fun t w => step (action_value H reward pi) t w - B t (take t w)) =
    E pi H [::] (fun w => \sum_(t < H) path_sum g (take t.+1 w) * (reward w - B t (take t w))).
Proof.
rewrite mean_undetachedE E_sum; apply: eq_bigr => t _; pose g' w := path_sum g (take t.+1 w).
pose Q w := step (action_value H reward pi) t w.
transitivity (E pi H [::] (fun w => g' w * Q w - g' w * B t (take t w))).
  rewrite -(E_rho_known AC (ltn_ord t)) => [|w _]; last by rewrite /g' /Q step_take // !take_take.
  by apply: eq_E => w _; rewrite /g' /Q; ring.
rewrite E_sub -E_action_value // => [|w _]; last by rewrite /g' take_take.
by rewrite -E_split // -E_sub; apply: eq_E => w _; rewrite mulrBr.
Qed.

(* For Q^pi itself: (T - k + 1) g_k R in the numbering from 1 of T = H tokens. *)
Theorem claim_9_action_value_overcount :
  mean_undetached (step (action_value H reward pi)) =
    E pi H [::] (fun w => \sum_(k < H) (H - k)%:R * step g k w * reward w).
Proof.
transitivity (mean_undetached (fun t w => step (action_value H reward pi) t w - 0)).
  by rewrite !mean_undetachedE; apply: eq_bigr => t _; apply: eq_E => w _; rewrite subr0.
rewrite (claim_9_action_value_undetached (fun _ _ => 0)); apply: eq_E => w /= sz_w.
rewrite -!big_distrl subr0 /=; congr (_ * _).
have {sz_w}le_Hw : (H <= size w)%N by rewrite sz_w.
elim: H le_Hw => [|n IHn] le_nw; first by rewrite !big_ord0.
rewrite !big_ord_recr /= IHn 1?ltnW // path_sum_take // big_ord_recr /= subSnn mul1r addrA -big_split.
by congr (_ + _); apply: eq_bigr => k _ /=; rewrite subSn 1?ltnW // mulrS; ring.
Qed.

End Expectations.
