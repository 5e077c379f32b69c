(* Outcome rewards: what a weight that ends before the string does estimates, and what is unbiased.

   The reward is any function of the finished string. The cumulative ratio of the first n tokens makes pi write them and
   leaves the others to b (lemma rho_switches of Expectations.v). The rest is read off from this: the mean of the
   cumulative ratio with an outcome, its bias and when there is none; the lookahead weight between the cumulative and
   the sequence ratio; three estimators without bias (per-decision, doubly robust, performance difference); the bias to
   first order in the step; and the batch size up to which the biased estimator has the smaller error. *)

From mathcomp Require Import all_ssreflect all_algebra ring.
From ctpo Require Import Trees Expectations Gradients PolicyGradient StopGradient.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(* --- one policy: steps and batches -------------------------------------------------------------------------------- *)

Section OnePolicy.

Variables (R : realFieldType) (A : finType) (H : nat).
Implicit Types (p : policy R A) (f g : seq A -> A -> R) (w : seq A).

Lemma take_string w : size w = H -> take H w = w.
Proof. by move=> <-; apply: take_size. Qed.

Lemma step_sub f g t w : step (fun s a => f s a - g s a) t w = step f t w - step g t w.
Proof. by rewrite /step; case: (drop t w) => [|a v]; rewrite ?subr0. Qed.

(* The sum over the tokens of a prefix. *)
Lemma path_sum_so_far f t w : size w = H -> (t < H)%N ->
  path_sum f (take t.+1 w) = \sum_(k < H | (k <= t)%N) step f k w.
Proof.
move=> sz_w lt_tH; rewrite path_sum_take ?sz_w //.
by rewrite (big_ord_widen H (fun k => step f k w) lt_tH).
Qed.

(* The expectation over n independent strings of p. *)
Fixpoint batch p n (F : seq (seq A) -> R) : R :=
  if n is n'.+1 then E p H [::] (fun w => batch p n' (fun ws => F (w :: ws))) else F [::].

Lemma eq_batch p n F G : (forall ws, size ws = n -> F ws = G ws) -> batch p n F = batch p n G.
Proof.
elim: n F G => [|n IHn] F G eqFG /=; first exact: eqFG.
by apply: eq_E => w _; apply: IHn => ws sz_ws; apply: eqFG; rewrite /= sz_ws.
Qed.

Lemma batch_const p n (c : R) : batch p n (fun=> c) = c.
Proof. by elim: n => //= n IHn; rewrite -[RHS](E_const p H [::]); apply: eq_E => w _. Qed.

Lemma batch_scale p n (c : R) F : batch p n (fun ws => c * F ws) = c * batch p n F.
Proof. by elim: n F => //= n IHn F; rewrite -E_scale; apply: eq_E => w _; rewrite IHn. Qed.

Lemma batch_sum p n (I : finType) (F : I -> seq (seq A) -> R) :
  batch p n (fun ws => \sum_i F i ws) = \sum_i batch p n (F i).
Proof. by elim: n F => //= n IHn F; rewrite -E_sum; apply: eq_E => w _; rewrite IHn. Qed.

End OnePolicy.

(* --- two policies ------------------------------------------------------------------------------------------------- *)

Section OutcomeReward.

Variables (R : realFieldType) (A : finType) (b pi : policy R A) (H : nat).
Hypothesis AC : absolutely_continuous b pi.
Implicit Types (g c Qh : seq A -> A -> R) (X Y reward : seq A -> R) (s w : seq A).

Local Notation rho := (rho b pi).

(* 4.expectation, what the cumulative ratio estimates:  E_b[ sum_t rho_t g_t R ] = sum_t E_pi[ g_t Q^b(s_t, a_t) ].
   The weight of a token includes the token's own ratio. Idea: pi writes up to the token, b all that comes after it. *)
Theorem claim_4_expectation g reward :
  E b H [::] (fun w => \sum_(t < H) rho (take t.+1 w) * (step g t w * reward w)) =
  \sum_(t < H) E pi H [::] (fun w => step g t w * step (action_value H reward b) t w).
Proof.
rewrite E_sum; apply: eq_bigr => t _; rewrite rho_switches // E_action_value // => w _.
by rewrite step_take.
Qed.

(* Its bias:  sum_t E_pi[ g_t (Q^b - Q^pi)(s_t, a_t) ].  The policy-gradient theorem has Q^pi where it has Q^b. *)
Theorem claim_4_expectation_bias g reward :
  E b H [::] (fun w => \sum_(t < H) rho (take t.+1 w) * (step g t w * reward w)) - gradient pi g H reward =
  \sum_(t < H) E pi H [::] (fun w =>
    step g t w * step (fun s a => action_value H reward b s a - action_value H reward pi s a) t w).
Proof.
rewrite claim_4_expectation policy_gradient_action_value -sumrB; apply: eq_bigr => t _.
by rewrite -E_sub; apply: eq_E => w _; rewrite step_sub mulrBr.
Qed.

(* 4.variance, what is true:  Var_b(rho_t g_t Q^pi(s_t, a_t)) <= Var_b(rho_H g_t R).  The left side is the conditional
   expectation of the right one given the tokens up to this one (Rao-Blackwell). *)
Theorem claim_4_variance_action_value g reward t : (t < H)%N ->
  Var b H [::] (fun w => rho (take t.+1 w) * (step g t w * step (action_value H reward pi) t w)) <=
  Var b H [::] (fun w => rho w * (step g t w * reward w)).
Proof.
move=> lt_tH; set X := fun w => rho w * (step g t w * reward w); pose M s := E b (H - t.+1) s X.
have M_eq w : size w = H -> reachable b w ->
    rho (take t.+1 w) * (step g t w * step (action_value H reward pi) t w) = M (take t.+1 w).
  move=> sz_w reach; have sz : size (take t.+1 w) = t.+1 by rewrite size_takel ?sz_w.
  rewrite /M /X change_of_measure ?reachable_take //; congr (_ * _).
  rewrite step_action_value ?sz_w // /value sz -E_scale; apply: eq_E => u _.
  by rewrite step_cat ?sz // step_take.
rewrite [leLHS](_ : _ = Var b H [::] (fun w => M (take t.+1 w))); last first.
  by congr (_ - _ ^+ 2); apply: eq_E_reachable => // w sz_w reach; rewrite M_eq.
rewrite /Var (E_prefix b (fun s => M s ^+ 2)) // (E_prefix b M) // -(E_split b X lt_tH) ler_add2r.
rewrite [leRHS](E_split _ _ lt_tH).
by apply: E_le => s; have := Var_ge0 b (H - t.+1) s X; rewrite /Var subr_ge0.
Qed.

(* The last token has no bias: nothing is left for b to write. *)
Theorem claim_4_expectation_last g reward t : t.+1 = H ->
  E b H [::] (fun w => rho (take t.+1 w) * (step g t w * reward w)) =
  E pi H [::] (fun w => step g t w * step (action_value H reward pi) t w).
Proof.
move=> last; have lt_tH : (t < H)%N by rewrite last.
rewrite -E_step_action_value // E_rho_known // => w sz_w.
by rewrite last (take_string sz_w).
Qed.

(* A baseline that is known before the token, a constant for one, changes nothing. *)
Theorem claim_4_expectation_baseline g reward (B : seq A -> R) : is_score pi g ->
  E b H [::] (fun w => \sum_(t < H) rho (take t.+1 w) * (step g t w * (reward w - B (take t w)))) =
  E b H [::] (fun w => \sum_(t < H) rho (take t.+1 w) * (step g t w * reward w)).
Proof.
move=> score; rewrite !E_sum; apply: eq_bigr => t _; apply/eqP; rewrite -subr_eq0 -E_sub; apply/eqP.
transitivity (- E b H [::] (fun w => rho (take t.+1 w) * (B (take t w) * step g t w))).
  by rewrite -E_opp; apply: eq_E => w _; ring.
rewrite E_rho_known // => [|w _]; last by rewrite take_take ?step_take.
by rewrite (E_centered (ltn_ord t) score) ?oppr0 // => w _; rewrite take_take.
Qed.

(* Nor does one made of n other strings of the group, in whatever way (leave-one-out: the mean of their rewards), which
   to this string is a constant. *)
Theorem claim_4_expectation_leave_one_out n g reward (B : seq (seq A) -> R) : is_score pi g ->
  batch H b n (fun others =>
    E b H [::] (fun w => \sum_(t < H) rho (take t.+1 w) * (step g t w * (reward w - B others)))) =
  E b H [::] (fun w => \sum_(t < H) rho (take t.+1 w) * (step g t w * reward w)).
Proof.
move=> score; rewrite -[RHS](batch_const H b n); apply: eq_batch => others _.
exact: (claim_4_expectation_baseline reward (fun=> B others) score).
Qed.

(* 4.additive: there is no bias if the gap Q^b - Q^pi does not depend on the token, on the strings that pi can write.
   Idea: a score has mean 0 against what does not depend on its token. *)
Theorem claim_4_additive g reward : is_score pi g ->
  (forall s a a', (size s < H)%N -> reachable pi (rcons s a) -> reachable pi (rcons s a') ->
    action_value H reward b s a - action_value H reward pi s a =
    action_value H reward b s a' - action_value H reward pi s a') ->
  E b H [::] (fun w => \sum_(t < H) rho (take t.+1 w) * (step g t w * reward w)) = gradient pi g H reward.
Proof.
move=> score flat; apply/eqP; rewrite -subr_eq0 claim_4_expectation_bias big1 // => t _.
set gap := fun s a => _ - _.
transitivity (E pi H [::] (step (fun s a => g s a * gap s a) t)); first by apply: eq_E => w _; rewrite step_mul.
rewrite E_step // -[RHS](E0 pi t [::]); apply: eq_E_reachable => // s /= sz_s reach.
rewrite /next; case: (pickP (fun a => pi s a != 0)) => [a0 a0_neq0 | zero]; last first.
  by apply: big1 => a _; move/negbFE/eqP: (zero a) => ->; rewrite mul0r.
transitivity (gap s a0 * next pi s (g s)); last by rewrite score mulr0.
rewrite big_distrr /=; apply: eq_bigr => a _.
have [-> | a_neq0] := eqVneq (pi s a) 0; first by rewrite !mul0r mulr0.
by rewrite /gap (@flat s a a0) ?sz_s ?reachable_rcons ?reach ?lt_def ?a_neq0 ?a0_neq0 ?prob_ge0 //; ring.
Qed.

(* It is so for a sum of rewards of position and token, if neither policy looks back: Q is then the rewards so far plus
   a mean of the rest that depends on the position only. *)
Theorem claim_4_additive_sum g (c : nat -> A -> R) :
  is_score pi g ->
  (forall s s' a, size s = size s' -> b s a = b s' a) -> (forall s s' a, size s = size s' -> pi s a = pi s' a) ->
  let reward := path_sum (fun s a => c (size s) a) in
  E b H [::] (fun w => \sum_(t < H) rho (take t.+1 w) * (step g t w * reward w)) = gradient pi g H reward.
Proof.
move=> score b_free pi_free reward; apply: claim_4_additive => // s a a' _ _ _.
have rest (p : policy R A) (free : forall s s' a, size s = size s' -> p s a = p s' a) n :
    forall s s', size s = size s' -> E p n s reward - reward s = E p n s' reward - reward s'.
  elim: n => [|n IHn] {}s s' eq_sz /=; first by rewrite !subrr.
  have split_off v : (\sum_a p v a * E p n (rcons v a) reward) - reward v =
      \sum_a p v a * (E p n (rcons v a) reward - reward (rcons v a) + c (size v) a).
    rewrite -[reward v in LHS]mul1r -(prob_sum1 p v) big_distrl -sumrB /=; apply: eq_bigr => a'' _.
    by rewrite /reward path_sum_rcons; ring.
  rewrite !split_off; apply: eq_bigr => a'' _.
  by rewrite (free s s' _ eq_sz) eq_sz (IHn (rcons s a'') (rcons s' a'')) // !size_rcons eq_sz.
have eq_sz : size (rcons s a) = size (rcons s a') by rewrite !size_rcons.
rewrite /action_value /value -eq_sz.
have := rest b b_free (H - size (rcons s a))%N _ _ eq_sz.
have := rest pi pi_free (H - size (rcons s a))%N _ _ eq_sz.
move=> /eqP; rewrite subr_eq => /eqP -> /eqP; rewrite subr_eq => /eqP ->; ring.
Qed.

(* --- lookahead ---------------------------------------------------------------------------------------------------- *)

(* Q at a token if pi goes on for N tokens (or to the end) and then b. *)
Definition lookahead_value N reward s a : R :=
  let left := (H - (size s).+1)%N in
  E pi (minn N left) (rcons s a) (fun v => E b (left - minn N left) v reward).

(* 4.lookahead:  E_b[ sum_t rho_min(t+N,H) g_t R ] = sum_t E_pi[ g_t Q ]  with Q for N tokens of pi and then b. The
   weight goes on for N tokens after the token itself. *)
Theorem claim_4_lookahead N g reward :
  E b H [::] (fun w => \sum_(t < H) rho (take (minn (t.+1 + N) H) w) * (step g t w * reward w)) =
  \sum_(t < H) E pi H [::] (fun w => step g t w * step (lookahead_value N reward) t w).
Proof.
rewrite E_sum; apply: eq_bigr => t _; rewrite rho_switches ?geq_minr //.
have -> : minn (t.+1 + N) H = (t.+1 + minn N (H - t.+1))%N by rewrite addn_minr subnKC.
rewrite subnDA E_tower [RHS](E_split _ _ (ltn_ord t)); apply: eq_E => s /= sz_s.
have lt_ts : (t < size s)%N by rewrite sz_s.
have [a [s_a step_a]] := take_step R lt_ts; rewrite take_oversize ?sz_s // in s_a.
transitivity (step g t s * step (lookahead_value N reward) t s); last first.
  by rewrite -[LHS](E_const pi (H - t.+1) s); apply: eq_E => u _; rewrite !step_cat.
rewrite (step_a (lookahead_value _ _)) /lookahead_value -s_a size_takel ?(ltnW lt_ts) // -E_scale.
apply: eq_E => u _; rewrite -E_scale; apply: eq_E => v _.
by rewrite !step_cat // size_cat ltn_addr.
Qed.

(* N = 0 is the cumulative ratio: the same weight, and the Q^b of 4.expectation. *)
Theorem claim_4_lookahead_zero reward s a (t : 'I_H) : (size s < H)%N ->
  minn (t.+1 + 0) H = t.+1 /\ lookahead_value 0 reward s a = action_value H reward b s a.
Proof.
move=> lt_sH; split; first by rewrite addn0; apply/minn_idPl.
by rewrite /lookahead_value min0n subn0 /action_value /value size_rcons.
Qed.

(* N >= H - 1 is exact, as each weight is then the sequence ratio. *)
Theorem claim_4_lookahead_exact N g reward : (H <= N.+1)%N ->
  E b H [::] (fun w => \sum_(t < H) rho (take (minn (t.+1 + N) H) w) * (step g t w * reward w)) =
  gradient pi g H reward.
Proof. by move=> le_HN; rewrite E_sum; apply: claim_T1_grid_outcome. Qed.

(* --- unbiased estimators ------------------------------------------------------------------------------------------ *)

(* The product of two steps, seen from the later one. *)
Lemma E_rho_steps g c (t k : 'I_H) : (t <= k)%N ->
  E b H [::] (fun w => rho (take k.+1 w) * (step g t w * step c k w)) =
  E pi H [::] (fun w => step g t w * step c k w).
Proof. by move=> le_tk; apply: E_rho_known => // w _; rewrite !step_take. Qed.

Lemma score_step g c (t k : 'I_H) : is_score pi g -> (k < t)%N ->
  E pi H [::] (fun w => step g t w * step c k w) = 0.
Proof.
move=> score lt_kt; rewrite -[RHS](E_centered (X := step c k) (ltn_ord t) score) => [|w _]; last exact: step_take.
by apply: eq_E => w _; rewrite mulrC.
Qed.

(* Scores need only what comes with them and after them. *)
Lemma causality g c : is_score pi g ->
  E pi H [::] (fun w => path_sum g w * path_sum c w) =
  \sum_(t < H) \sum_(k < H | (t <= k)%N) E pi H [::] (fun w => step g t w * step c k w).
Proof.
move=> score; transitivity (\sum_(t < H) \sum_(k < H) E pi H [::] (fun w => step g t w * step c k w)).
  under eq_bigr do rewrite -E_sum; rewrite -E_sum; apply: eq_E => w sz_w.
  by rewrite !(path_sumE _ sz_w) big_distrl; apply: eq_bigr => t _; rewrite big_distrr.
apply: eq_bigr => t _; rewrite (bigID (fun k : 'I_H => (t <= k)%N)) /= addrC big1 ?add0r // => k.
by rewrite -ltnNge; apply: score_step.
Qed.

(* 4.per_decision, for rewards c along the way:  E_b[ sum_t g_t sum_{k>=t} rho_k c_k ] = grad J.
   Idea: rho_k is enough for a reward that is known at k, and earlier rewards have nothing to do with g_t. *)
Theorem claim_4_per_decision g c : is_score pi g ->
  E b H [::] (fun w => \sum_(t < H) step g t w * (\sum_(k < H | (t <= k)%N) rho (take k.+1 w) * step c k w)) =
  gradient pi g H (path_sum c).
Proof.
move=> score; rewrite policy_gradient (causality _ score) E_sum; apply: eq_bigr => t _.
transitivity (\sum_(k < H | (t <= k)%N) E b H [::] (fun w => rho (take k.+1 w) * (step g t w * step c k w))).
  by rewrite -E_sum; apply: eq_E => w _; rewrite big_distrr; apply: eq_bigr => k _; rewrite mulrCA.
by apply: eq_bigr => k le_tk; rewrite E_rho_steps.
Qed.

(* With a reward at the last token only it is the sequence ratio, on every string. *)
Theorem claim_4_per_decision_outcome g c w : size w = H -> (forall k, (k.+1 < H)%N -> step c k w = 0) ->
  \sum_(t < H) step g t w * (\sum_(k < H | (t <= k)%N) rho (take k.+1 w) * step c k w) =
  rho w * (path_sum g w * path_sum c w).
Proof.
move=> sz_w only_last; rewrite mulrCA (path_sumE g sz_w) big_distrl; apply: eq_bigr => t _ /=; congr (_ * _).
rewrite (path_sumE c sz_w) big_distrr [LHS]big_mkcond; apply: eq_bigr => k _ /=.
have [lt_kH | ] := boolP (k.+1 < H)%N; first by rewrite only_last // !mulr0 if_same.
by rewrite -leqNgt => le_Hk; rewrite take_oversize ?sz_w // -ltnS (leq_trans (ltn_ord t)).
Qed.

(* 4.doubly_robust, with any critic Qh and Vh(s) = E_pi[Qh(s, .)]:  E_b[ sum_t g_t D_t ] = grad J  for
     D_t = rho_H R + sum_{k>t} (rho_{k-1} Vh(s_k) - rho_k Qh(s_k, a_k)) - rho_t Vh(s_t),
   rho_k with the ratio of token k. Idea: each correction has mean 0 under pi given its history, and the baseline leaves
   g_t a mean of 0. *)
Definition doubly_robust_term Qh reward t w : R :=
  let Vh s := next pi s (Qh s) in
  rho w * reward w
  + \sum_(k < H | (t < k)%N) (rho (take k w) * Vh (take k w) - rho (take k.+1 w) * step Qh k w)
  - rho (take t.+1 w) * Vh (take t w).

Lemma E_correction g Qh (t k : 'I_H) : (t < k)%N ->
  E b H [::] (fun w => step g t w * (rho (take k w) * next pi (take k w) (Qh (take k w))
                                     - rho (take k.+1 w) * step Qh k w)) = 0.
Proof.
move=> lt_tk; pose V s := next pi s (Qh s); pose Y s := step g t s.
transitivity (E b H [::] (fun w => rho (take k w) * (step g t w * V (take k w)))
            - E b H [::] (fun w => rho (take k.+1 w) * (step g t w * step Qh k w))).
  by rewrite -E_sub; apply: eq_E => w _; rewrite /V; ring.
rewrite (E_rho_steps _ _ (ltnW lt_tk)) E_rho_known ?(ltnW (ltn_ord k)) // => [|w _]; last first.
  by rewrite step_take // take_take.
apply/eqP; rewrite subr_eq0; apply/eqP.
transitivity (E pi H [::] (fun w => (step g t (take k w)) * step Qh k w)); last first.
  by apply: eq_E => w _; rewrite step_take.
rewrite (E_known_step pi (ltn_ord k)) -(E_prefix pi (fun s => step g t s * V s) (ltnW (ltn_ord k))).
by apply: eq_E => w _; rewrite step_take.
Qed.

Theorem claim_4_doubly_robust g Qh reward : is_score pi g ->
  E b H [::] (fun w => \sum_(t < H) step g t w * doubly_robust_term Qh reward t w) = gradient pi g H reward.
Proof.
move=> score; rewrite E_sum policy_gradient_steps; apply: eq_bigr => t _.
pose base w := rho (take t.+1 w) * (next pi (take t w) (Qh (take t w)) * step g t w).
transitivity (E b H [::] (fun w => rho (take H w) * (step g t w * reward w))
  + \sum_(k < H | (t < k)%N) E b H [::] (fun w =>
      step g t w * (rho (take k w) * next pi (take k w) (Qh (take k w)) - rho (take k.+1 w) * step Qh k w))
  - E b H [::] base).
  rewrite -E_sum -E_add -E_sub; apply: eq_E => w /= sz_w.
  by rewrite /doubly_robust_term /base -big_distrr /= (take_string sz_w); set corrections := \sum_(k < _ | _) _; ring.
rewrite big1 ?addr0 => [|k]; last exact: E_correction.
rewrite E_rho_known // => [|w sz_w]; last by rewrite (take_string sz_w).
rewrite /base E_rho_known // => [|w _]; last by rewrite take_take ?step_take.
by rewrite (E_centered (ltn_ord t) score) ?subr0 // => w _; rewrite take_take.
Qed.

(* The same with rewards along the way, sum_{k>=t} rho_k c_k in place of rho_H R. *)
Theorem claim_4_doubly_robust_rewards g c Qh : is_score pi g ->
  let Vh s := next pi s (Qh s) in
  E b H [::] (fun w => \sum_(t < H) step g t w *
    (\sum_(k < H | (t <= k)%N) rho (take k.+1 w) * step c k w
     + \sum_(k < H | (t < k)%N) (rho (take k w) * Vh (take k w) - rho (take k.+1 w) * step Qh k w)
     - rho (take t.+1 w) * Vh (take t w))) = gradient pi g H (path_sum c).
Proof.
move=> score Vh; pose sequence w := \sum_(t < H) step g t w * (rho w * path_sum c w).
have E_sequence : E b H [::] sequence = gradient pi g H (path_sum c).
  rewrite policy_gradient -(E_rho_times AC); apply: eq_E => w sz_w.
  by rewrite /sequence -big_distrl -(path_sumE g sz_w) mulrCA.
rewrite -(claim_4_doubly_robust Qh (path_sum c) score) -[LHS](addrK (gradient pi g H (path_sum c))).
rewrite -{1}E_sequence -(claim_4_per_decision c score) -E_add -E_sub; apply: eq_E => w _ /=.
rewrite /sequence -big_split -sumrB /=; apply: eq_bigr => t _; rewrite /doubly_robust_term -/(Vh _).
by set rewards := \sum_(k < _ | (t <= k)%N) _; set corrections := \sum_(k < _ | _) _; ring.
Qed.

(* With the exact Q^pi the sum telescopes: D_t = rho_t A^pi(s_t, a_t) on every string. *)
Theorem claim_4_doubly_robust_exact reward t w : size w = H -> (t < H)%N ->
  doubly_robust_term (action_value H reward pi) reward t w = rho (take t.+1 w) * step (advantage H reward pi) t w.
Proof.
move=> sz_w lt_tH; set Q := action_value H reward pi.
have V s : (size s < H)%N -> next pi s (Q s) = value H reward pi s by move=> ?; rewrite value_next.
have stepQ k : (k < H)%N -> step Q k w = value H reward pi (take k.+1 w).
  by move=> lt_kH; rewrite step_action_value ?sz_w.
have value_w : value H reward pi (take H w) = reward w by rewrite (take_string sz_w) /value sz_w subnn.
pose S k := rho (take k w) * value H reward pi (take k w).
rewrite /doubly_robust_term.
have -> : \sum_(k < H | (t < k)%N) (rho (take k w) * next pi (take k w) (Q (take k w))
    - rho (take k.+1 w) * step Q k w) = S t.+1 - S H.
  transitivity (- \sum_(t.+1 <= k < H) (S k.+1 - S k)); last by rewrite telescope_sumr // opprB.
  rewrite -sumrN -(big_mkord (fun k => t < k)%N (fun k => rho (take k w) * next pi (take k w) (Q (take k w))
    - rho (take k.+1 w) * step Q k w)) (big_cat_nat _ _ _ (leq0n t.+1)) //=.
  rewrite big_nat_cond big1 ?add0r => [|k /andP[/andP[_ lt_kt] lt_tk]]; last first.
    by move: lt_kt; rewrite ltnS leqNgt lt_tk.
  rewrite big_nat_cond [RHS]big_nat_cond; apply: eq_big => [k | k /andP[/andP[_ lt_kH] _]]; first by case: (t < k)%N.
  by rewrite /S stepQ // V ?opprB // size_takel ?sz_w // ltnW.
rewrite step_advantage ?sz_w // -/Q V ?size_takel ?sz_w ?(ltnW lt_tH) // stepQ // /S value_w (take_string sz_w); ring.
Qed.

(* Without a critic it is the sequence ratio. *)
Theorem claim_4_doubly_robust_zero reward t w :
  doubly_robust_term (fun _ _ => 0) reward t w = rho w * reward w.
Proof.
have next0 s : next pi s (fun=> 0) = 0 by apply: big1 => a _; rewrite mulr0.
have step0 k : step (fun _ _ => 0) k w = 0 :> R by rewrite /step; case: (drop k w).
by rewrite /doubly_robust_term next0 mulr0 subr0 big1 ?addr0 // => k _; rewrite next0 step0 !mulr0 subr0.
Qed.

(* The performance difference lemma:  J(pi) - J(b) = E_pi[ sum_t A^b(s_t, a_t) ].  The advantages telescope. *)
Theorem claim_4_performance_difference_lemma reward :
  objective H reward pi - objective H reward b = E pi H [::] (path_sum (advantage H reward b)).
Proof. exact: performance_difference. Qed.

(* 4.performance_difference:  E_b[ sum_t rho_t A^b(s_t, a_t) sum_{k<=t} g_k ] = grad J,  with a critic of b only.
   Idea: it is the derivative of the lemma, and what 9.behavior_advantage says of the whole product. *)
Theorem claim_4_performance_difference g reward : is_score pi g ->
  E b H [::] (fun w => \sum_(t < H) rho (take t.+1 w) * (step (advantage H reward b) t w * path_sum g (take t.+1 w))) =
  gradient pi g H reward.
Proof.
move=> score; rewrite -(claim_9_behavior_advantage_undetached H reward AC score); apply: eq_E => w /= sz_w.
by rewrite /undetached sz_w; apply: eq_bigr => t _; rewrite mulrA.
Qed.

(* --- the batch size at which bias costs more than it saves -------------------------------------------------------- *)

(* The mean squared error of the mean of n independent strings, over the coordinates i of X. *)
Definition mse (I : finType) n (X : I -> seq A -> R) (theta : I -> R) : R :=
  batch H b n (fun ws => \sum_i ((\sum_(w <- ws) X i w) / n%:R - theta i) ^+ 2).

(* Bias and variance:  MSE = |bias|^2 + Var / n. *)
Lemma mse_bias_variance (I : finType) n (X : I -> seq A -> R) theta :
  mse n.+1 X theta = \sum_i (E b H [::] (X i) - theta i) ^+ 2 + trace_var b H [::] X / n.+1%:R.
Proof.
have square Y m (d : R) : E b H [::] Y = 0 ->
    batch H b m (fun ws => (\sum_(w <- ws) Y w + d) ^+ 2) = m%:R * E b H [::] (fun w => Y w ^+ 2) + d ^+ 2.
  move=> Y0; set V := E b H [::] (fun w => Y w ^+ 2); elim: m d => [|m IHm] d /=; first by rewrite big_nil mul0r !add0r.
  transitivity (E b H [::] (fun w => m%:R * V + d ^+ 2 + Y w ^+ 2 + (d *+ 2) * Y w)).
    apply: eq_E => w _ /=; rewrite (@eq_batch _ _ H b _ _ (fun ws => (\sum_(w <- ws) Y w + (Y w + d)) ^+ 2)).
      by rewrite IHm; ring.
    by move=> ws _; rewrite big_cons [in RHS]addrCA addrA.
  by rewrite 2!E_add E_const E_scale Y0 -/V; ring.
rewrite /mse /trace_var batch_sum mulr_suml -big_split; apply: eq_bigr => i _.
set m := E b H [::] (X i); have n_neq0 : n.+1%:R != 0 :> R by rewrite pnatr_eq0.
rewrite (@eq_batch _ _ H b _ _ (fun ws => n.+1%:R ^- 2 * (\sum_(w <- ws) (X i w - m) + n.+1%:R * (m - theta i)) ^+ 2)).
  rewrite batch_scale square; last by rewrite E_sub E_const subrr.
  rewrite -Var_centered /=; move: n.+1%:R n_neq0 (Var b H [::] (X i)) => N N_neq0 V; field; exact: N_neq0.
move=> ws sz_ws; rewrite sumrB big_const_seq count_predT sz_ws iter_addr_0 -[m *+ _]mulr_natr.
by move: n.+1%:R n_neq0 (\sum_(w <- ws) X i w) => N N_neq0 total; field; exact: N_neq0.
Qed.

(* 4.crossover: the mean over n strings of the cumulative estimator has a smaller mean squared error than that of the
   sequence ratio just if n < n* = (Var_sequence - Var_cumulative) / |bias|^2, and a larger one just if n > n*; g lists
   the coordinates of the gradient. *)
Section Crossover.

Variables (I : finType) (g : I -> seq A -> A -> R) (reward : seq A -> R).
Let cumulative i w := \sum_(t < H) rho (take t.+1 w) * (step (g i) t w * reward w).
Let sequence i w := \sum_(t < H) rho w * (step (g i) t w * reward w).
Let truth i := gradient pi (g i) H reward.
Let bias2 := \sum_i (E b H [::] (cumulative i) - truth i) ^+ 2.
Let n_star := (trace_var b H [::] sequence - trace_var b H [::] cumulative) / bias2.

Lemma E_sequence i : E b H [::] (sequence i) = truth i.
Proof.
rewrite /truth -(@claim_4_lookahead_exact H) //; apply: eq_E => w /= sz_w; apply: eq_bigr => t _.
by have /minn_idPr -> : (H <= t.+1 + H)%N by [rewrite leq_addl]; rewrite (take_string sz_w).
Qed.

Theorem claim_4_crossover n : (0 < n)%N -> (exists i, E b H [::] (cumulative i) != truth i) ->
  ((mse n cumulative truth < mse n sequence truth) = (n%:R < n_star)) /\
  ((mse n sequence truth < mse n cumulative truth) = (n_star < n%:R)).
Proof.
case: n => // n _ [i biased]; have bias2_gt0 : 0 < bias2.
  have square_ge0 j : true -> 0 <= (E b H [::] (cumulative j) - truth j) ^+ 2 by rewrite sqr_ge0.
  rewrite lt_def sumr_ge0 // andbT; apply: contraNneq biased => zero.
  by rewrite -subr_eq0 -sqrf_eq0 (psumr_eq0P square_ge0 zero).
have n_gt0 : 0 < n.+1%:R :> R by rewrite ltr0n.
have -> : mse n.+1 sequence truth = trace_var b H [::] sequence / n.+1%:R.
  by rewrite mse_bias_variance big1 ?add0r // => j _; rewrite E_sequence subrr expr0n.
rewrite mse_bias_variance -/bias2 /n_star (ltr_pdivl_mulr _ _ n_gt0) (ltr_pdivr_mulr _ _ n_gt0).
rewrite (ltr_pdivl_mulr _ _ bias2_gt0) (ltr_pdivr_mulr _ _ bias2_gt0) ltr_subr_addr ltr_subl_addr.
by rewrite mulrDl divfK ?lt0r_neq0 // mulrC.
Qed.

End Crossover.

End OutcomeReward.

(* --- the bias to first order in the step -------------------------------------------------------------------------- *)

(* The target is pi_eps = b r with ratios r = 1 + eps x + ..., where x is the score of b in the direction of the step,
   and y = x + ... is the score of pi_eps in that direction; both are polynomials in eps of any degree, of which only
   the terms shown count. A bias is then a polynomial in eps as well. *)
Section FirstOrder.

Variables (R : realFieldType) (A : finType) (b : policy R A) (H : nat) (reward : seq A -> R).
Variables (x : seq A -> A -> R) (r y : seq A -> A -> {poly R}).
Hypothesis r_0 : forall s a, (r s a)`_0 = 1.
Hypothesis r_1 : forall s a, (r s a)`_1 = x s a.
Hypothesis y_0 : forall s a, (y s a)`_0 = x s a.
Implicit Types (weight : nat -> seq A -> {poly R}) (s w : seq A).

Let bp s a : {poly R} := (b s a)%:P.
Let target s a : {poly R} := bp s a * r s a.

(* S1 = sum_{k<t} E_b[ x_k x_t R ]  and  D = sum_t E_b[ x_t^2 R ]. *)
Definition S1 : R := \sum_(t < H) \sum_(k < H | (k < t)%N) E b H [::] (fun w => step x k w * step x t w * reward w).
Definition D : R := \sum_(t < H) E b H [::] (fun w => step x t w ^+ 2 * reward w).

(* The bias, along the step, of E_b[ sum_t weight_t g_t R ] for the gradient E_pi[ sum_t g_t R ] at pi_eps. *)
Definition bias_along weight : {poly R} :=
  E bp H [::] (fun w => \sum_(t < H) weight t w * (step y t w * (reward w)%:P)) -
  E target H [::] (fun w => path_sum y w * (reward w)%:P).

Lemma E_target n s (X : seq A -> {poly R}) :
  path_prod r s * E target n s X = E bp n s (fun w => path_prod r w * X w).
Proof.
elim: n s => //= n IHn s; rewrite big_distrr; apply: eq_bigr => a _ /=.
by rewrite -IHn path_prod_rcons /target; ring.
Qed.

(* The sequence ratio has no bias, to any order. *)
Theorem claim_4_first_order_sequence : bias_along (fun _ w => path_prod r w) = 0.
Proof.
apply/eqP; rewrite subr_eq0 -[E target _ _ _]mul1r -(path_prod_nil r) E_target; apply/eqP.
by apply: eq_E => w sz_w; rewrite /= -big_distrr -big_distrl /path_sum sz_w.
Qed.

Lemma coef_step_x (f : seq A -> A -> {poly R}) i t w :
  (forall s a, (f s a)`_i = x s a) -> (step f t w)`_i = step x t w.
Proof. by move=> coefs; rewrite coef_step /step; case: drop. Qed.

Lemma coef_rho w : (path_prod r w)`_0 = 1 /\ (path_prod r w)`_1 = path_sum x w.
Proof. by apply: coef_path_prod. Qed.

(* 4.first_order, for weights 1 + eps m_t + ...: the bias along the step is
     eps sum_t E_b[ (m_t - sum_k x_k) x_t R ] + ...
   Idea: the gradient is what the sequence ratio estimates, so the bias is E_b[ sum_t (weight_t - rho_H) y_t R ]; the
   bracket starts at order eps, so that of y_t only the x_t at eps = 0 counts. *)
Theorem claim_4_first_order weight (m : nat -> seq A -> R) :
  (forall (t : 'I_H) w, size w = H -> (weight t w)`_0 = 1) ->
  (forall (t : 'I_H) w, size w = H -> (weight t w)`_1 = m t w) ->
  (bias_along weight)`_0 = 0 /\
  (bias_along weight)`_1 = \sum_(t < H) E b H [::] (fun w => (m t w - path_sum x w) * (step x t w * reward w)).
Proof.
move=> weight_0 weight_1; rewrite -[bias_along weight]subr0 -claim_4_first_order_sequence.
have -> : bias_along weight - bias_along (fun _ w => path_prod r w) =
    E bp H [::] (fun w => \sum_(t < H) (weight t w - path_prod r w) * (step y t w * (reward w)%:P)).
  rewrite /bias_along opprB addrA subrK -E_sub; apply: eq_E => w _.
  by rewrite -sumrB; apply: eq_bigr => t _; rewrite mulrBl.
have gap_0 (t : 'I_H) w : size w = H -> (weight t w - path_prod r w)`_0 = 0.
  by move=> sz_w; rewrite coefB weight_0 // (coef_rho w).1 subrr.
rewrite !coef_E; split.
  rewrite -[RHS](E0 b H [::]); apply: eq_E => w sz_w; rewrite coef_sum big1 // => t _.
  by rewrite coef0M gap_0 ?mul0r.
rewrite -E_sum; apply: eq_E => w sz_w; rewrite coef_sum; apply: eq_bigr => t _.
by rewrite coef1M gap_0 // mul0r add0r coefB weight_1 // (coef_rho w).2 coefMC (coef_step_x _ _ y_0).
Qed.

(* Pairs of tokens: the past of each, its future, and itself. *)
Let pair (k t : nat) := E b H [::] (fun w => step x k w * step x t w * reward w).

Lemma later_pairs : \sum_(t < H) \sum_(k < H | (t < k)%N) pair k t = S1.
Proof.
rewrite (exchange_big_dep xpredT) //=; apply: eq_bigr => k _; apply: eq_bigr => t _.
by apply: eq_E => w _; rewrite [step x k w * _]mulrC.
Qed.

Lemma all_pairs : \sum_(t < H) E b H [::] (fun w => path_sum x w * (step x t w * reward w)) = 2%:R * S1 + D.
Proof.
transitivity (\sum_(t < H) (\sum_(k < H | (k < t)%N) pair k t + pair t t + \sum_(k < H | (t < k)%N) pair k t)).
  apply: eq_bigr => t _; transitivity (\sum_(k < H) pair k t).
    rewrite -E_sum; apply: eq_E => w sz_w; rewrite (path_sumE x sz_w) big_distrl /=.
    by apply: eq_bigr => k _; rewrite mulrA.
  rewrite (bigID (fun k : 'I_H => (k < t)%N)) /= -addrA; congr (_ + _); rewrite (bigD1 t) ?ltnn //=; congr (_ + _).
  by apply: eq_bigl => k; rewrite -leqNgt [RHS]ltn_neqAle [in RHS]eq_sym andbC.
rewrite !big_split /= later_pairs -[X in X + _ + _]/S1 -[X in S1 + X + _]/D; ring.
Qed.

(* The cumulative ratio: -S1. It misses the ratios after the token. *)
Theorem claim_4_first_order_cumulative : (bias_along (fun t w => path_prod r (take t.+1 w)))`_1 = - S1.
Proof.
have [||_ ->] := @claim_4_first_order (fun t w => path_prod r (take t.+1 w)) (fun t w => path_sum x (take t.+1 w)).
- by move=> t w _; apply: (coef_rho _).1.
- by move=> t w _; apply: (coef_rho _).2.
rewrite -later_pairs -sumrN; apply: eq_bigr => t _; rewrite -E_sum -E_opp; apply: eq_E => w sz_w.
rewrite (path_sum_so_far x sz_w (ltn_ord t)) (path_sumE x sz_w).
rewrite [X in _ - X](bigID (fun k : 'I_H => (k <= t)%N)) /= opprD addrA subrr.
rewrite sub0r mulNr big_distrl /=; congr (- _); apply: eq_big => [k | k _]; first by rewrite -ltnNge.
by rewrite mulrA.
Qed.

(* The token ratio: -2 S1. It misses the ratios before the token as well. *)
Theorem claim_4_first_order_token : (bias_along (fun t w => step r t w))`_1 = - (2%:R * S1).
Proof.
have [||_ ->] := @claim_4_first_order (fun t w => step r t w) (step x).
- move=> t w sz_w; have [|a [_ ->]] := @take_step [comRingType of {poly R}] A t w; first by rewrite sz_w.
  exact: r_0.
- by move=> t w _; apply: coef_step_x.
have -> : 2%:R * S1 = 2%:R * S1 + D - D by rewrite addrK.
rewrite -all_pairs /D -sumrB -sumrN; apply: eq_bigr => t _; rewrite -E_sub -E_opp; apply: eq_E => w _.
by ring.
Qed.

(* No weight: -(2 S1 + D). It misses all ratios. *)
Theorem claim_4_first_order_none : (bias_along (fun _ _ => 1))`_1 = - (2%:R * S1 + D).
Proof.
have [||_ ->] := @claim_4_first_order (fun _ _ => 1) (fun _ _ => 0).
- by move=> *; rewrite coefC.
- by move=> *; rewrite coefC.
by rewrite -all_pairs -sumrN; apply: eq_bigr => t _; rewrite -E_opp; apply: eq_E => w _; rewrite sub0r mulNr.
Qed.

(* The H-th root of the sequence ratio (GSPO), which need be one to first order only: -(1 - 1/H)(2 S1 + D). *)
Theorem claim_4_first_order_gspo (root : seq A -> {poly R}) :
  (0 < H)%N -> (forall w, size w = H -> (root w)`_0 = 1) ->
  (forall w, size w = H -> (root w ^+ H)`_1 = (path_prod r w)`_1) ->
  (bias_along (fun _ w => root w))`_1 = - ((1 - H%:R^-1) * (2%:R * S1 + D)).
Proof.
move=> H_gt0 root_0 root_1; have H_neq0 : H%:R != 0 :> R by rewrite pnatr_eq0 -lt0n.
have power n (P : {poly R}) : P`_0 = 1 -> (P ^+ n)`_0 = 1 /\ (P ^+ n)`_1 = n%:R * P`_1.
  move=> P0; elim: n => [|n [IH0 IH1]]; first by rewrite expr0 !coefC mul0r.
  by rewrite exprS coef0M coef1M IH0 IH1 P0; split; ring.
have [||_ ->] := @claim_4_first_order (fun _ w => root w) (fun _ w => path_sum x w / H%:R).
- by move=> t w /root_0.
- move=> t w sz_w; have [_ root_H] := power H _ (root_0 w sz_w).
  by rewrite -(coef_rho w).2 -root_1 // root_H mulrAC divff ?mul1r.
rewrite -all_pairs big_distrr -sumrN; apply: eq_bigr => t _ /=; rewrite -E_scale -E_opp; apply: eq_E => w _.
by field.
Qed.

End FirstOrder.

(* A constant baseline leaves S1 as it is: for k < t the score x_t has mean 0 given x_k. *)
Theorem claim_4_first_order_baseline (R : realFieldType) (A : finType) (b : policy R A) H reward x (c : R) :
  is_score b x -> S1 b H (fun w => reward w - c) x = S1 b H reward x.
Proof.
move=> score; apply: eq_bigr => t _; apply: eq_bigr => k lt_kt.
rewrite -[RHS]subr0 -(mulr0 c) -(E_centered (X := step x k) (ltn_ord t) score) => [|w _]; last exact: step_take.
by rewrite -E_scale -E_sub; apply: eq_E => w _; ring.
Qed.
