(* The counterexamples of groups, lengths, windows, noise and targets that were trained on the sample.

   Every theorem gives the numbers of one small world over the rationals, with the definitions of Trees.v, Gradients.v
   and Rationals.v. The comment after each number is its name in proofs/counterexamples.json. *)

From mathcomp Require Import all_ssreflect all_algebra ring.
From ctpo Require Import Trees Gradients Rationals.

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

(* --- a target that was trained on the sample ---------------------------------------------------------------------- *)

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
