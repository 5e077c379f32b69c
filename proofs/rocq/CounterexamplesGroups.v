(* The counterexamples of groups, lengths, windows, noise and targets that were trained on the sample.

   Every theorem gives the numbers of one small world over the rationals, with the definitions of Trees.v, Gradients.v
   and Rationals.v. The comment after each number is its name in proofs/counterexamples.json. *)

From mathcomp Require Import all_ssreflect all_algebra ring.
From ctpo Require Import Trees Gradients OutcomeReward GroupAdvantages Windows Rationals.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Implicit Types (s w : seq bool) (a : bool).

(* --- groups of two ------------------------------------------------------------------------------------------------ *)

(* The mean and the population standard deviation of two rewards, and what the first is worth relative to them. *)
Definition pair_mid (x y : rat) : rat := (x + y) / 2%:R.
Definition pair_std (x y : rat) : rat := `|x - y| / 2%:R.
Definition normalized x y : rat := (x - pair_mid x y) / pair_std x y.

Lemma pair_std_sqr x y : pair_std x y ^+ 2 = ((x - pair_mid x y) ^+ 2 + (y - pair_mid x y) ^+ 2) / 2%:R.
Proof. by rewrite /pair_std /pair_mid expr_div_n real_normK ?num_real //; field. Qed.

Lemma normalized_sg x y : normalized x y = Num.sg (x - y).
Proof.
have [-> | neq_xy] := eqVneq x y; first by rewrite /normalized /pair_std subrr normr0 mul0r invr0 mulr0 sgr0.
rewrite /normalized (_ : x - pair_mid x y = (x - y) / 2%:R); last by rewrite /pair_mid; field.
by rewrite /pair_std -mulf_div divff // mulr1 {1}[x - y]numEsg mulfK // normr_eq0 subr_eq0.
Qed.

Lemma sg_nat m n : Num.sg (m%:R - n%:R : rat) = if (m < n)%N then -1 else (n < m)%N%:R.
Proof.
case: ltngtP => [lt_mn | lt_nm | ->]; last by rewrite subrr sgr0.
  by rewrite ltr0_sg // subr_lt0 ltr_nat.
by rewrite gtr0_sg // subr_gt0 ltr_nat.
Qed.

(* Rewards 0, 1 and a third one, pi = (1/2, 1/4, 1/4), the logit of the second token. *)
Section ThreeRewards.

Variable top : nat.

Definition three_policy := @one_of_three 2 1 1 isT.
Definition three_reward (h : seq 'I_3) : rat := if h is c :: _ then (nth 0%N [:: 0; 1; top]%N c)%:R else 0.
Definition second_logit := softmax_score three_policy (fun=> tt) tt (@Ordinal 3 1 isT).

(* The gradient of a group of two with normalized advantages. *)
Definition pair_gradient (u v : seq 'I_3) : rat :=
  (normalized (three_reward u) (three_reward v) * path_sum second_logit u +
   normalized (three_reward v) (three_reward u) * path_sum second_logit v) / 2%:R.

Lemma second_logitE (h : seq 'I_3) (c : 'I_3) : second_logit h c = (val c == 1%N)%:R - 1 / 4%:R.
Proof. by rewrite /second_logit /softmax_score eqxx !mul1r -val_eqE. Qed.

Lemma three_gradient : gradient three_policy second_logit 1 three_reward = 3%:R / 16%:R - top%:R / 16%:R.
Proof. by rewrite gradient_one_token !big_ord_recl big_ord0 !second_logitE /= /three_prob /=; field. Qed.

Lemma pair_gradientE (c d : 'I_3) (r := fun e : 'I_3 => nth 0%N [:: 0; 1; top]%N e) :
  pair_gradient [:: c] [:: d] =
    (if (r c < r d)%N then -1 else (r d < r c)%N%:R) * ((val c == 1%N)%:R - (val d == 1%N)%:R) / 2%:R.
Proof.
rewrite /pair_gradient !normalized_sg /path_sum /= !big_ord_recl !big_ord0 /step /= !second_logitE !sg_nat.
rewrite -/(r c) -/(r d).
by case: ltngtP => _ /=; field.
Qed.

Lemma pair_gradient_mean : (1 < top)%N ->
  E three_policy 1 [::] (fun u => E three_policy 1 [::] (pair_gradient u)) = 1%:R / 16%:R.
Proof.
move=> top_gt1; rewrite /= !big_ord_recl !big_ord0 /= !pair_gradientE /= top_gt1 (ltnW top_gt1) ltnn /= /three_prob /=.
rewrite (ltnNge top) (ltnW top_gt1) /=.
by field.
Qed.

End ThreeRewards.

(* Divided by the standard deviation of its group of two, the expected gradient points the other way. *)
Theorem claim_6_std_sign (pi := three_policy) (g := second_logit) (reward := three_reward 10) :
  gradient pi g 1 reward = - 7%:R / 16%:R (* true gradient *) /\
  E pi 1 [::] (fun u => E pi 1 [::] (pair_gradient 10 u)) = 1%:R / 16%:R (* divided by std *).
Proof. by rewrite three_gradient pair_gradient_mean //; split=> //; field. Qed.

Theorem claim_6_std_sign_small (pi := three_policy) (g := second_logit) (reward := three_reward 4) :
  gradient pi g 1 reward = - 1%:R / 16%:R (* true gradient *) /\
  E pi 1 [::] (fun u => E pi 1 [::] (pair_gradient 4 u)) = 1%:R / 16%:R (* divided by std *).
Proof. by rewrite three_gradient pair_gradient_mean //; split=> //; field. Qed.

(* Without a weight the baseline is not free: a constant added to R turns the raw estimate around. *)
Theorem claim_6_baseline_off_policy_example (b := coins (1 // 2)) (pi := coins (3 // 4)) (R := token 0)
    (G := path_sum (shared_logit pi)) :
  [/\ gradient pi (shared_logit pi) 1 R = 3%:R / 16%:R (* true gradient *),
      E b 1 [::] (fun u => R u * G u) = 1%:R / 8%:R (* no baseline, R = a *),
      pair_mean b 1 (fun u v => ((R u - R v) * G u + (R v - R u) * G v) / 2%:R) = 1%:R / 4%:R
        (* leave-one-out, R = a *),
      E b 1 [::] (fun u => (1 + R u) * G u) = - 1%:R / 8%:R (* no baseline, R = 1 + a *) &
      pair_mean b 1 (fun u v => ((1 + R u - (1 + R v)) * G u + (1 + R v - (1 + R u)) * G v) / 2%:R) = 1%:R / 4%:R
        (* leave-one-out, R = 1 + a *)].
Proof. solve_all. Qed.

(* --- lengths ------------------------------------------------------------------------------------------------------ *)

(* Stop (R = 0) or go on (R = 1), and after that stop at the second token or write a third. The factor 1/T brings in how
   b goes on, though the advantage is the exact A^pi: neither grad J nor the on-policy value. *)
Theorem claim_6_length_prop1_example (b := stop_or_go (1 // 2) (3 // 4)) (pi := stop_or_go (1 // 2) (1 // 2))
    (reward := token 0) (f := fun s a => position_logit 0 pi s a * advantage 3 reward pi s a) :
  [/\ gradient pi (position_logit 0 pi) 3 reward = 1%:R / 4%:R (* true gradient *),
      E b 3 [::] (fun w => weighted_sum 3 (cumulative_ratio b pi) f w / (written w)%:R) = 11%:R / 64%:R
        (* rho_t / T under b *) &
      E pi 3 [::] (fun w => path_sum f w / (written w)%:R) = 17%:R / 96%:R (* 1 / T under pi *)].
Proof. solve_all. Qed.

(* Stop (R = 3/4) or write one more token (R = 1): 1/T turns the gradient around, and a baseline c is not neutral. *)
Theorem claim_6_length_sign (pi := stop_or_go (1 // 2) (1 // 2)) (g := position_logit 0 pi)
    (reward := fun w => 3%:R / 4%:R + token 0 w / 4%:R)
    (by_length := fun c => E pi 2 [::] (fun w => (reward w - c) / (written w)%:R * path_sum g w)) :
  [/\ gradient pi g 2 reward = 1%:R / 16%:R (* true gradient *),
      by_length 0 = - 1%:R / 16%:R (* 1/T at c = 0 *),
      by_length (1 / 2%:R) = 0%:R (* 1/T at c = 1/2 *) &
      by_length (7%:R / 8%:R) = 3%:R / 64%:R (* 1/T at c = 7/8 *)] /\
  E pi 2 [::] (fun w => path_sum g w / (written w)%:R) = - 1%:R / 8%:R (* E[(1/T) sum g] *) /\
  E pi 2 [::] (fun w => (0 - 1 / 2%:R) / (written w)%:R * path_sum g w) = 1%:R / 16%:R
    (* all wrong, 1/T at c = 1/2 *).
Proof. solve_all. Qed.

(* --- clipping ----------------------------------------------------------------------------------------------------- *)

(* R = 2 a1 - a2, one shared logit, the exact A^pi and the window [4/5, 6/5]: what clipping leaves of the gradient
   points the other way, under the cumulative and under the token ratio. *)
Theorem claim_6_clip_sign (b := coins (1 // 2)) (pi := coins (3 // 4))
    (reward := fun w => 2%:R * token 0 w - token 1 w) (A := advantage 2 reward pi)
    (window := (4%:R / 5%:R, 6%:R / 5%:R)) :
  [/\ gradient pi (shared_logit pi) 2 reward = 3%:R / 16%:R (* true gradient *),
      E b 2 [::] (clipped_sum 2 window (cumulative_ratio b pi) A (shared_logit pi)) = - 45%:R / 256%:R
        (* clipped rho_t *) &
      E b 2 [::] (clipped_sum 2 window (token_ratio b pi) A (shared_logit pi)) = - 3%:R / 16%:R (* clipped r_t *)].
Proof. solve_all. Qed.

Theorem claim_6_clip_identity_all (b := coins (1 // 2)) (pi := coins (3 // 4)) (A := advantage 1 (token 0) pi)
    (window := (4%:R / 5%:R, 6%:R / 5%:R)) :
  gradient pi (shared_logit pi) 1 (token 0) = 3%:R / 16%:R (* true gradient *) /\
  E b 1 [::] (clipped_sum 1 window (cumulative_ratio b pi) A (shared_logit pi)) = 0%:R (* clipped *).
Proof. solve_all. Qed.

(* One sample in a hundred is clipped, and half of the gradient is gone. *)
Theorem claim_6_clip_identity_rare (b := coins (1 // 100)) (pi := coins (1 // 2)) (A := advantage 1 (token 0) pi)
    (window := (0, 6%:R / 5%:R)) (is_clipped := fun w => clipped window (cumulative_ratio b pi 0 w) (step A 0 w)) :
  [/\ E b 1 [::] (fun w => (is_clipped w)%:R) = 1%:R / 100%:R (* clipped under b *),
      E pi 1 [::] (fun w => (is_clipped w)%:R) = 1%:R / 2%:R (* clipped under pi *),
      gradient pi (shared_logit pi) 1 (token 0) = 1%:R / 4%:R (* true gradient *) &
      E b 1 [::] (clipped_sum 1 window (cumulative_ratio b pi) A (shared_logit pi)) = 1%:R / 8%:R
        (* clipped gradient *)].
Proof. solve_all. Qed.

(* --- three policies ----------------------------------------------------------------------------------------------- *)

Theorem claim_7_third_policy_example (b := coins (1 // 2)) (pi := coins (3 // 4)) :
  [/\ E (coins (1 // 2)) 1 [::] (rho b pi) = 1%:R (* mu(1) = 1/2 *),
      E (coins (5 // 8)) 1 [::] (rho b pi) = 9%:R / 8%:R (* mu(1) = 5/8 *) &
      E (coins (3 // 4)) 1 [::] (rho b pi) = 5%:R / 4%:R (* mu(1) = 3/4 *)].
Proof. solve_all. Qed.

(* --- group means as baselines ------------------------------------------------------------------------------------- *)

(* A mean that includes the response itself makes the gradient shorter, by 1 - 1/G. *)
Theorem claim_6_mean_example (b := coins (1 // 2)) (R := token 0) (X := path_sum (shared_logit b))
    (estimate := fun G => group_E b (group_estimate (H := 1) (G := G) R X (fun=> group_mean R))) :
  [/\ gradient b (shared_logit b) 1 R = 1%:R / 4%:R (* true gradient *),
      estimate 2%N = 1%:R / 8%:R (* G = 2 *), estimate 4%N = 3%:R / 16%:R (* G = 4 *) &
      estimate 8%N = 7%:R / 32%:R (* G = 8 *)].
Proof.
have X0 : E b 1 [::] X = 0 by solve_all.
have RX : E b 1 [::] (fun w => R w * X w) = 1 / 4%:R by solve_all.
by rewrite {}/estimate !(claim_6_mean R _ X0) // RX; solve_all.
Qed.

(* Under the weight rho_2^(1/2) no baseline is free, as E_b[w sum_t g_t] is not 0. *)
Theorem claim_6_mean_root (b := coins (1 // 5)) (pi := coins (4 // 5)) (reward := both)
    (root := fun (s : seq bool) (a : bool) => if a then 2%:R else 1 / 2%:R : rat)
    (X := weighted_sum 2 (fun=> path_prod root) (shared_logit pi)) :
  (forall s a, 0 <= root s a /\ root s a ^+ 2 = ratio b pi s a) /\
  [/\ E b 2 [::] X = - 48%:R / 125%:R (* E[w sum g] *),
      in_pairs b 2 X reward (fun _ _ => 0) = 8%:R / 125%:R (* no baseline *),
      in_pairs b 2 X reward (fun mine other => (mine + other) / 2%:R) = 124%:R / 3125%:R (* group mean *) &
      in_pairs b 2 X reward (fun _ other => other) = 248%:R / 3125%:R (* leave-one-out *)].
Proof.
split; last by solve_all.
by move=> s []; split=> //; rewrite /ratio /= /Coins.coin /probability /=; compute_number.
Qed.

(* Nor is a constant one under a clip. *)
Theorem claim_6_mean_clip (b := coins (1 // 2)) (pi := coins (3 // 4)) (window := (4%:R / 5%:R, 6%:R / 5%:R))
    (with_baseline := fun c => E b 1 [::]
       (clipped_sum 1 window (cumulative_ratio b pi) (fun s a => a%:R - c) (shared_logit pi))) :
  with_baseline 0 = 0%:R (* baseline 0 *) /\ with_baseline 2%:R = - 3%:R / 16%:R (* baseline 2 *).
Proof. solve_all. Qed.

(* The world of claim_4_unbiased_sign in groups of two: a baseline does not repair the sign. *)
Theorem claim_6_leave_one_out_sign (b := two_tokens (1 // 2) (1 // 4) (1 // 4))
    (pi := two_tokens (1 // 2) (3 // 4) (3 // 4))
    (reward := fun w => token 0 w * token 1 w + (1 - token 0 w) * (1 - token 1 w))
    (X := weighted_sum 2 (cumulative_ratio b pi) (position_logit 0 pi)) :
  [/\ gradient pi (position_logit 0 pi) 2 reward = 1%:R / 8%:R (* true gradient *),
      in_pairs b 2 X reward (fun _ _ => 0) = - 1%:R / 8%:R (* no baseline *),
      in_pairs b 2 X reward (fun _ other => other) = - 1%:R / 8%:R (* leave-one-out *) &
      in_pairs b 2 X reward (fun mine other => (mine + other) / 2%:R) = - 1%:R / 16%:R (* group mean *)].
Proof. solve_all. Qed.

(* --- the token mean ----------------------------------------------------------------------------------------------- *)

(* Only batches of strings of H tokens count. *)
Lemma eq_batch_strings H (p : binary_policy) n (F G : seq (seq bool) -> rat) :
  (forall ws, all (fun w => size w == H) ws -> F ws = G ws) -> batch H p n F = batch H p n G.
Proof.
elim: n F G => [|n IHn] F G eqFG /=; first exact: eqFG.
by apply: eq_E => w sz_w; apply: IHn => ws sz_ws; apply: eqFG; rewrite /= sz_w eqxx.
Qed.

(* A batch of n responses that stop or go on with 1/2 each, and a function of how many go on and how many stop. *)
Fixpoint tossed n (F : nat -> nat -> rat) k m : rat :=
  if n is n'.+1 then (tossed n' F k.+1 m + tossed n' F k m.+1) / 2%:R else F k m.

Definition stops w := ~~ head false w.

Lemma batch_tossed n F k m (pi := stop_or_go (1 // 2) (1 // 2)) :
  batch 2 pi n (fun ws => F (count (head false) ws + k)%N (count stops ws + m)%N) = tossed n F k m.
Proof.
elim: n k m => // n IHn k m.
transitivity (\sum_a pi [::] a * \sum_c pi [:: a] c * tossed n F (a + k) (~~ a + m)).
  apply: eq_bigr => a _; congr (_ * _); apply: eq_bigr => c _; congr (_ * _); rewrite -IHn; apply: eq_batch => ws _ /=.
  by congr F; rewrite -addnA addnCA.
by rewrite !big_bool /= /Coins.coin /probability /=; move: (tossed _ _ _ _) (tossed _ _ _ _) => x y; field.
Qed.

(* Stop (R = 3/4) or write one more token (R = 1), no baseline: the token mean of a batch has the wrong sign for n < 3,
   and is not yet its limit at any n. *)
Theorem claim_6_token_mean_example (pi := stop_or_go (1 // 2) (1 // 2)) (g := position_logit 0 pi)
    (reward := fun w => 3%:R / 4%:R + token 0 w / 4%:R)
    (token_mean := fun n => batch 2 pi n (fun ws =>
       (\sum_(w <- ws) reward w * path_sum g w) / (\sum_(w <- ws) (written w)%:R))) :
  [/\ token_mean 1%N = - 1%:R / 16%:R (* n = 1 *), token_mean 2%N = - 1%:R / 96%:R (* n = 2 *),
      token_mean 3%N = 1%:R / 128%:R (* n = 3 *), token_mean 4%N = 15%:R / 896%:R (* n = 4 *) &
      token_mean 6%N = 6011%:R / 236544%:R (* n = 6 *)] /\
  gradient pi g 2 reward / E pi 2 [::] (fun w => (written w)%:R) = 1%:R / 24%:R (* limit grad J / E[T] *).
Proof.
suff mean n : token_mean n = tossed n (fun k m => (k%:R / 2%:R - 3%:R * m%:R / 8%:R) / (2 * k + m)%:R) 0 0.
  by rewrite !mean; split; last (by solve_all); split; rewrite /tossed; compute_number.
have term a c : reward [:: a; c] * path_sum g [:: a; c] = (if a then 1 / 2%:R else - 3%:R / 8%:R).
  by rewrite /reward /g /pi; case: a c => [] []; unfold_estimator; unfold_policies; compute_number.
rewrite -batch_tossed; apply: eq_batch_strings => ws sizes; congr (_ / _).
  elim: ws sizes => [|[|a [|c [|]]] ws IHws] //= sizes; first by rewrite big_nil; compute_number.
  by rewrite big_cons term IHws // !addn0; case: a; rewrite /= ?add0n !natrD; field.
elim: ws sizes => [|w ws IHws] /=; first by rewrite big_nil.
case: w => [|a [|c [|]]] //= sizes; rewrite big_cons IHws // !addn0 -natrD; congr _%:R.
move: (count _ _) (count _ _) => k m; case: a c => [] []; rewrite /stops /= ?add0n.
all: by [rewrite mulnDr -addnA | rewrite addnCA].
Qed.

(* --- the dual bound ----------------------------------------------------------------------------------------------- *)

(* The clipped surrogate with A^b is a lower bound of J(pi) - J(b); with a dual bound of 2 it is not. *)
Theorem claim_6_pessimism_dual (b := coins (1 // 4)) (pi := coins (3 // 4)) (reward := fun w => 1 - token 0 w)
    (A := advantage 1 reward b)
    (surrogate := fun w => clipped_value (4%:R / 5%:R) (6%:R / 5%:R) (rho b pi w) (step A 0 w))
    (dual := fun w => if step A 0 w < 0 then Num.max (surrogate w) (2%:R * step A 0 w) else surrogate w) :
  [/\ E pi 1 [::] reward - E b 1 [::] reward = - 1%:R / 2%:R (* J(pi) - J(b) *),
      E b 1 [::] surrogate = - 1%:R / 2%:R (* clipped *) &
      E b 1 [::] dual = - 5%:R / 16%:R (* clipped, dual bound 2 *)].
Proof. by rewrite {}/dual {}/surrogate /clipped_value /clip; solve_all. Qed.

(* --- windows and drift -------------------------------------------------------------------------------------------- *)

(* The neutral first token of Windows.v picks hot or cold; n more tokens. *)
Theorem claim_7_superlinear_example (log2_rho := path_sum (fun s a => (hot_log2 s a)%:~R))
    (spread := fun n => Var (hot_b rat_realFieldType) n.+1 [::] log2_rho) :
  (forall s a, ratio (hot_b rat_realFieldType) (hot_pi rat_realFieldType) s a = 2%:R ^ hot_log2 s a) /\
  [/\ spread 1%N = 17%:R / 36%:R (* n = 1 *), spread 2%N = 1%:R (* n = 2 *), spread 4%N = 20%:R / 9%:R (* n = 4 *) &
      spread 6%N = 11%:R / 3%:R (* n = 6 *)].
Proof.
have [ratio_log2 every_n] := claim_7_superlinear_every_n rat_realFieldType.
by split=> //; rewrite {}/spread !every_n; split; compute_number.
Qed.

(* Independent tokens whose ratios are 2 and 1/2. After an odd number of them rho_t is at most 1/2 or at least 2. *)
Section Halves.

Local Notation b := (coins (1 // 3)).
Local Notation pi := (coins (2 // 3)).
Let ones w := count id w.
Let zeros w := count negb w.

Lemma rho_halves w : rho b pi w = 2%:R ^+ ones w / 2%:R ^+ zeros w.
Proof.
elim/last_ind: w => [|w a IHw]; first by rewrite rho_nil divr1.
rewrite rho_rcons IHw /ones /zeros -cats1 !count_cat /=.
have -> : ratio b pi w a = 2%:R ^+ (a + 0) / 2%:R ^+ (~~ a + 0).
  by case: a; rewrite /ratio /= /Coins.coin /probability /=; compute_number.
by rewrite mulf_div -!exprD.
Qed.

Lemma rho_outside w (lo hi : rat) : odd (size w) -> 1 / 2%:R < lo <= 1 -> 1 <= hi < 2%:R ->
  ((rho b pi w < lo) = (ones w < zeros w)%N) * ((hi < rho b pi w) = (zeros w < ones w)%N).
Proof.
have two_gt0 k : 0 < 2%:R ^+ k :> rat by rewrite exprn_gt0 // ltr0n.
have sizes : (ones w + zeros w)%N = size w by rewrite -(count_predC id w).
rewrite -sizes rho_halves => odd_w /andP[lo_gt lo_le] /andP[hi_ge hi_lt].
case: (ltngtP (ones w) (zeros w)) => [lt|lt|eq]; last by move: odd_w; rewrite eq addnn odd_double.
  have le_half : 2%:R ^+ ones w / 2%:R ^+ zeros w <= 1 / 2%:R :> rat.
    rewrite ler_pdivr_mulr // mulrAC ler_pdivl_mulr ?ltr0n // mul1r -exprSr.
    by rewrite ler_eexpn2l // ltr1n.
  rewrite (le_lt_trans le_half lo_gt); split=> //; apply/negbTE; rewrite -leNgt (le_trans le_half) //.
  by apply: le_trans hi_ge; rewrite ler_pdivr_mulr ?ltr0n // mul1r ler1n.
have ge_two : 2%:R <= 2%:R ^+ ones w / 2%:R ^+ zeros w :> rat.
  by rewrite ler_pdivl_mulr // -exprS ler_eexpn2l // ltr1n.
rewrite (lt_le_trans hi_lt ge_two); split=> //; apply/negbTE; rewrite -leNgt; apply: le_trans ge_two.
by apply: le_trans lo_le _; rewrite ler1n.
Qed.

(* Every window between 1/2 and 2 around 1, as exp(-sqrt(t) / 40) to exp(sqrt(t) / 20) is for t <= 5, clips the same. *)
Variables lo hi : nat -> rat.
Hypothesis lo_near_1 : forall t, (t <= 5)%N -> 1 / 2%:R < lo t <= 1.
Hypothesis hi_near_1 : forall t, (t <= 5)%N -> 1 <= hi t < 2%:R.

Lemma clipped_share (p : binary_policy) t : odd t -> (t <= 5)%N ->
  (Pr p t (fun w => rho b pi w < lo t) = E p t [::] (fun w => (ones w < zeros w)%N%:R)) *
  (Pr p t (fun w => hi t < rho b pi w) = E p t [::] (fun w => (zeros w < ones w)%N%:R)).
Proof.
by move=> odd_t le_t5; split; apply: eq_E => w /= sz_w;
  rewrite (rho_outside (w := w) _ (lo_near_1 le_t5) (hi_near_1 le_t5)) ?sz_w.
Qed.

Theorem claim_7_window_shares :
  [/\ Pr b 1 (fun w => rho b pi w < lo 1%N) = 2%:R / 3%:R (* A < 0, t = 1 *),
      Pr b 3 (fun w => rho b pi w < lo 3%N) = 20%:R / 27%:R (* A < 0, t = 3 *) &
      Pr b 5 (fun w => rho b pi w < lo 5%N) = 64%:R / 81%:R (* A < 0, t = 5 *)] /\
  [/\ Pr b 1 (fun w => hi 1%N < rho b pi w) = 1%:R / 3%:R (* A > 0, t = 1 *),
      Pr b 3 (fun w => hi 3%N < rho b pi w) = 7%:R / 27%:R (* A > 0, t = 3 *) &
      Pr b 5 (fun w => hi 5%N < rho b pi w) = 17%:R / 81%:R (* A > 0, t = 5 *)].
Proof. by rewrite !clipped_share //; rewrite /ones /zeros; solve_all. Qed.

(* Above the window are most of the tokens that pi writes, and few of those of b. *)
Theorem claim_7_pi_mass_example :
  [/\ Pr b 1 (fun w => hi 1%N < rho b pi w) = 1%:R / 3%:R (* b, t = 1 *),
      Pr b 3 (fun w => hi 3%N < rho b pi w) = 7%:R / 27%:R (* b, t = 3 *) &
      Pr b 5 (fun w => hi 5%N < rho b pi w) = 17%:R / 81%:R (* b, t = 5 *)] /\
  [/\ Pr pi 1 (fun w => hi 1%N < rho b pi w) = 2%:R / 3%:R (* pi, t = 1 *),
      Pr pi 3 (fun w => hi 3%N < rho b pi w) = 20%:R / 27%:R (* pi, t = 3 *) &
      Pr pi 5 (fun w => hi 5%N < rho b pi w) = 64%:R / 81%:R (* pi, t = 5 *)].
Proof. by rewrite !clipped_share //; rewrite /ones /zeros; solve_all. Qed.

End Halves.

(* --- noise that is not normalized --------------------------------------------------------------------------------- *)

(* Recorded probabilities of a fair coin that are twice and half the true ones, and do not add up to 1. *)
Theorem claim_12_kind_not_normalized (b := coins (1 // 2))
    (recorded := fun s a => b s a * (if a then 2%:R else 1 / 2%:R)) (mean := fun t =>
       E b t [::] (path_prod (fun s a => recorded s a / b s a))) :
  [/\ mean 1%N = 5%:R / 4%:R (* t = 1 *), mean 2%N = 25%:R / 16%:R (* t = 2 *),
      mean 3%N = 125%:R / 64%:R (* t = 3 *), mean 4%N = 625%:R / 256%:R (* t = 4 *) &
      mean 5%N = 3125%:R / 1024%:R (* t = 5 *)].
Proof. solve_all. Qed.

(* --- targets that were trained on the sample ---------------------------------------------------------------------- *)

(* A fair toss a, and the target after a step of log 2 along A g on it, both of its logits moving: the odds of 1 are
   multiplied by 2^(2 A (a - 1/2)). The means are over tosses, each with the target that it made. *)
Theorem claim_13_own_coin (b := coins (1 // 2))
    (odds := fun p : binary_policy => p [::] true / p [::] false)
    (up := fun a : bool => coins (if a then 2 // 3 else 1 // 3))
    (ones := fun a : bool => coins (if a then 2 // 3 else 1 // 2))
    (down := fun a : bool => coins (if a then 1 // 3 else 2 // 3))
    (trained := fun (target : bool -> binary_policy) w => rho b (target (nth false w 0)) w) :
  [/\ odds (up true) = 2%:R /\ odds (up false) = 1 / 2%:R,
      odds (ones true) = 2%:R /\ odds (ones false) = 1 &
      odds (down true) = 1 / 2%:R /\ odds (down false) = 2%:R] /\
  [/\ E b 1 [::] (trained up) = 4%:R / 3%:R (* E rho, R = 1 *),
      E b 1 [::] (trained ones) = 7%:R / 6%:R (* E rho, R = a *),
      E b 1 [::] (trained down) = 2%:R / 3%:R (* E rho, R = -1 *) &
      E b 1 [::] (fun w => trained ones w * token 0 w * path_sum (shared_logit (ones (nth false w 0))) w
        - gradient (ones (nth false w 0)) (shared_logit (ones (nth false w 0))) 1 (token 0)) = - 1%:R / 72%:R
        (* bias, R = a *)].
Proof. solve_all. Qed.

(* Fair tokens, and the target after a step of log 2 along A sum_t g_t of one string w, which moves both logits of each
   prefix of w: there the odds of 1 are multiplied by 2^A if w goes on with 1, by 2^-A if with 0. *)
Definition power_of_two (z : int) : chance := match z with Posz 0 => 1 // 2 | Posz _ => 2 // 3 | Negz _ => 1 // 3 end.
Definition push (A : int) w s : int :=
  if same_string s (take (size s) w) && (size s < size w)%N then if nth false w (size s) then A else - A else 0.

Theorem claim_13_own_pair (b := coins (1 // 2))
    (target := fun A w => binary (fun s => power_of_two (push (A w) w s)))
    (E_rho := fun t A => E b 2 [::] (fun w => rho b (target A w) (take t w)))
    (product := fun w => (nth false w 0 && nth false w 1 : nat)%:Z)
    (sum := fun w => (nth false w 0 + nth false w 1)%N%:Z - 1) :
  (forall A w s, `|A w| <= 1 -> target A w s true / target A w s false = 2%:R ^ push (A w) w s) /\
  [/\ E_rho 1%N (fun=> 1) = 4%:R / 3%:R (* E rho_1, R = 1 *), E_rho 2%N (fun=> 1) = 16%:R / 9%:R (* E rho_2, R = 1 *),
      E_rho 1%N product = 13%:R / 12%:R (* E rho_1, R = a1 a2 *) &
      E_rho 2%N product = 43%:R / 36%:R (* E rho_2, R = a1 a2 *)] /\
  E_rho 1%N sum = 1%:R (* E rho_1, R = a1 + a2 - 1 *) /\ E_rho 2%N sum = 19%:R / 18%:R (* E rho_2, R = a1 + a2 - 1 *).
Proof.
split; last by solve_all.
move=> A w s small; have : `|push (A w) w s| <= 1 by rewrite /push; case: ifP => // _; case: ifP; rewrite ?normrN.
rewrite /= /Coins.coin; case: (push _ _ _) => [[|[|z]]|[|z]] //= _; rewrite /probability /=; compute_number.
Qed.

(* A group of two with its mean as baseline, R = a: a step of 12 log 2 on one response x, beside the other one y, moves
   the logit of 1 by 12 A g, and the ratio of either response is no longer of mean 1. *)
Theorem claim_13_group_pair (b := coins (1 // 3)) (odds := fun p : binary_policy => p [::] true / p [::] false)
    (A := fun x y : bool => x%:R - (x%:R + y%:R) / 2%:R)
    (target := fun x y : bool => coins (if x == y then 1 // 3 else if x then 8 // 9 else 2 // 3)) :
  (forall x y, exists2 z : int,
     z%:~R = 12%:R * A x y * shared_logit b [::] x & odds (target x y) = odds b * 2%:R ^ z) /\
  pair_mean b 1 (fun u v => rho b (target (nth false u 0) (nth false v 0)) v) = 28%:R / 27%:R
    (* E rho of the other response *) /\
  pair_mean b 1 (fun u v => rho b (target (nth false u 0) (nth false v 0)) u) = 34%:R / 27%:R
    (* E rho of the response itself *).
Proof.
split; last by solve_all.
move=> x y; exists (if x == y then 0 else if x then 4 else 2 : int).
  by case: x y => [] []; rewrite shared_logit_tree /A /= /Coins.coin /probability /=; compute_number.
by case: x y => [] []; rewrite /odds /exprz /= /Coins.coin /probability /=; compute_number.
Qed.

(* The expectation of f(x + the number of ones) over n tosses of a fair coin. The number of tosses that are guessed
   right, whatever they are guessed from, has the same law. *)
Fixpoint tossed_sum n (f : rat -> rat) x : rat :=
  if n is n'.+1 then (tossed_sum n' f (x + 1) + tossed_sum n' f x) / 2%:R else f x.

Lemma right_guesses (guess : seq bool -> bool) f n s (right := path_sum (fun s a => (a == guess s)%:R : rat)) :
  E (coins (1 // 2)) n s (fun v => f (right v)) = tossed_sum n f (right s).
Proof.
elim: n s => //= n IHn s; rewrite big_bool !IHn /right !path_sum_rcons /Coins.coin /probability /=.
by case: (guess s); rewrite /= addr0; move: (tossed_sum _ _ _) (tossed_sum _ _ _) => x y; field.
Qed.

(* Fair tokens with logits of each position and R = 1 or -1 by the last token: the same step multiplies the odds of 1 at
   a position by 2 if the string's token there equals its last one, by 1/2 if not. Every ratio is then 2/3 or 4/3, and
   log2 rho_t is t log2(2/3) plus the number of ratios that are 4/3: of the string itself, and of a fresh one. *)
Theorem claim_13_spread_last_token (b := coins (1 // 2))
    (target := fun w => binary (fun s => if nth false w (size s) == last false w then 2 // 3 else 1 // 3))
    (up := fun w s (a : bool) => (a == (nth false w (size s) == last false w)) : nat)
    (ups := fun w => path_sum (fun s a => (up w s a)%:R : rat))
    (own := fun t w => ups w (take t w)) (fresh := fun t w v => ups w (take t v)) :
  (forall w s a, ratio b (target w) s a = 2%:R / 3%:R * 2%:R ^+ up w s a) /\
  [/\ Var b 4 [::] (own 1%N) = 1%:R / 4%:R (* Var log2 rho_1, trained on *),
      Var b 4 [::] (own 2%N) = 1%:R (* Var log2 rho_2, trained on *),
      Var b 4 [::] (own 3%N) = 9%:R / 4%:R (* Var log2 rho_3, trained on *) &
      Var b 4 [::] (own 4%N) = 4%:R (* Var log2 rho_4, trained on *)] /\
  [/\ pair_Var b 4 (fresh 1%N) = 1%:R / 4%:R (* Var log2 rho_1, fresh *),
      pair_Var b 4 (fresh 2%N) = 1%:R / 2%:R (* Var log2 rho_2, fresh *),
      pair_Var b 4 (fresh 3%N) = 3%:R / 4%:R (* Var log2 rho_3, fresh *) &
      pair_Var b 4 (fresh 4%N) = 1%:R (* Var log2 rho_4, fresh *)] /\
  [/\ E b 4 [::] (fun w => rho b (target w) (take 1 w)) = 1%:R (* E rho_1, trained on *),
      E b 4 [::] (fun w => rho b (target w) (take 2 w)) = 10%:R / 9%:R (* E rho_2, trained on *),
      E b 4 [::] (fun w => rho b (target w) (take 3 w)) = 4%:R / 3%:R (* E rho_3, trained on *) &
      E b 4 [::] (fun w => rho b (target w) (take 4 w)) = 136%:R / 81%:R (* E rho_4, trained on *)] /\
  [/\ pair_mean b 4 (fun w v => rho b (target w) (take 1 v)) = 1%:R (* E rho_1, fresh *),
      pair_mean b 4 (fun w v => rho b (target w) (take 2 v)) = 1%:R (* E rho_2, fresh *),
      pair_mean b 4 (fun w v => rho b (target w) (take 3 v)) = 1%:R (* E rho_3, fresh *) &
      pair_mean b 4 (fun w v => rho b (target w) (take 4 v)) = 1%:R (* E rho_4, fresh *)].
Proof.
have up_ratio w s a : ratio b (target w) s a = 2%:R / 3%:R * 2%:R ^+ up w s a.
  by rewrite /ratio /up /= /Coins.coin; case: (_ == last _ _) a => [] []; rewrite /probability /=; compute_number.
have AC w : absolutely_continuous b (target w).
  move=> s a _ b0; have : b s a = 1 / 2%:R by case: a {b0}; rewrite /= /probability /=; compute_number.
  by rewrite b0 => /esym/eqP; rewrite mulf_eq0 oner_eq0 invr_eq0 pnatr_eq0.
have rho_fresh t : (t <= 4)%N -> pair_mean b 4 (fun w v => rho b (target w) (take t v)) = 1.
  move=> le_t4; rewrite -[RHS](E_const b 4 [::]); apply: eq_E => w _; rewrite E_prefix //.
  transitivity (E b t [::] (fun v => rho b (target w) v * 1)); first by apply: eq_E => v _; rewrite mulr1.
  by rewrite change_of_measure // rho_nil E_const mulr1.
have ups_fresh f t : (t <= 4)%N -> pair_mean b 4 (fun w v => f (fresh t w v)) = tossed_sum t f 0.
  move=> le_t4; rewrite -[RHS](E_const b 4 [::]); apply: eq_E => w _.
  rewrite (E_prefix b (fun v => f (ups w v))) // -(path_sum_nil (fun s a => (up w s a)%:R : rat)).
  exact: (right_guesses (fun s => nth false w (size s) == last false w)).
have Var_fresh t : (t <= 4)%N -> pair_Var b 4 (fresh t) = tossed_sum t (fun x => x ^+ 2) 0 - tossed_sum t id 0 ^+ 2.
  by move=> le_t4; rewrite /pair_Var (ups_fresh (fun x => x ^+ 2)) // (ups_fresh id).
split=> //; rewrite !Var_fresh // !rho_fresh //; split; [|split; [|split; last by split]].
- by solve_all.
- by split; rewrite /tossed_sum; compute_number.
by solve_all.
Qed.
