(* The counterexamples of summed gradients, the stop-gradient form, the released loss and the correction of the
   sampler.

   Every theorem gives the numbers of one small world over the rationals, with the definitions of Trees.v, Gradients.v
   and Rationals.v. The comment after each number is its name in proofs/counterexamples.json. *)

From mathcomp Require Import all_ssreflect all_algebra ring.
From ctpo Require Import Trees Gradients SummedGradient Rationals.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Implicit Types (s w : seq bool) (a : bool).

(* --- the summed gradient ------------------------------------------------------------------------------------------ *)

(* One shared logit and the exact A^pi. Every term has the smaller variance under the cumulative ratio, but their sum Y
   has the larger one; the sum Z under the sequence ratio has none at all. *)
Theorem claim_5_ordered_A (b := two_tokens (1 // 2) (5 // 9) (4 // 9)) (pi := coins (1 // 3))
    (reward := fun w => token 0 w + token 1 w) (f := fun s a => shared_logit pi s a * advantage 2 reward pi s a) :
  [/\ gradient pi (shared_logit pi) 2 reward = 4%:R / 9%:R (* true gradient *),
      [/\ path_sum f [:: false; false] = 2%:R / 9%:R (* F(00) *),
          path_sum f [:: false; true] = 5%:R / 9%:R (* F(01) *),
          path_sum f [:: true; false] = 5%:R / 9%:R (* F(10) *) &
          path_sum f [:: true; true] = 8%:R / 9%:R (* F(11) *)],
      [/\ Var b 2 [::] (fun w => rho b pi (take 1 w) * step f 0 w) = 4%:R / 729%:R (* Var rho_1 f_1 *),
          Var b 2 [::] (fun w => rho b pi w * step f 0 w) = 4%:R / 405%:R (* Var rho_2 f_1 *),
          Var b 2 [::] (fun w => rho b pi (take 2 w) * step f 1 w) = 4%:R / 405%:R
            (* Var rho_2 f_2 under rho_t *) &
          Var b 2 [::] (fun w => rho b pi w * step f 1 w) = 4%:R / 405%:R (* Var rho_2 f_2 under rho_H *)],
      Var b 2 [::] (weighted_sum 2 (cumulative_ratio b pi) f) = 16%:R / 3645%:R (* Var Y *) &
      Var b 2 [::] (weighted_sum 2 (sequence_ratio b pi) f) = 0%:R (* Var Z *)].
Proof. solve_all. Qed.

(* The same with b and pi from one family, two coins with different odds, and a reward of 1 for the string 10 only. *)
Theorem claim_5_ordered_B (b := coins (1 // 5)) (pi := coins (2 // 5))
    (reward := fun w => token 0 w * (1 - token 1 w)) (f := fun s a => shared_logit pi s a * advantage 2 reward pi s a) :
  [/\ gradient pi (shared_logit pi) 2 reward = 6%:R / 125%:R (* true gradient *),
      [/\ path_sum f [:: false; false] = 12%:R / 125%:R (* F(00) *),
          path_sum f [:: false; true] = 12%:R / 125%:R (* F(01) *),
          path_sum f [:: true; false] = 7%:R / 125%:R (* F(10) *) &
          path_sum f [:: true; true] = - 18%:R / 125%:R (* F(11) *)],
      [/\ Var b 2 [::] (fun w => rho b pi (take 1 w) * step f 0 w) = 324%:R / 15625%:R (* Var rho_1 f_1 *),
          Var b 2 [::] (fun w => rho b pi w * step f 0 w) = 486%:R / 15625%:R (* Var rho_2 f_1 *),
          Var b 2 [::] (fun w => rho b pi (take 2 w) * step f 1 w) = 1296%:R / 15625%:R
            (* Var rho_2 f_2 under rho_t *) &
          Var b 2 [::] (fun w => rho b pi w * step f 1 w) = 1296%:R / 15625%:R (* Var rho_2 f_2 under rho_H *)],
      Var b 2 [::] (weighted_sum 2 (cumulative_ratio b pi) f) = 756%:R / 15625%:R (* Var Y *) &
      Var b 2 [::] (weighted_sum 2 (sequence_ratio b pi) f) = 54%:R / 3125%:R (* Var Z *)].
Proof. solve_all. Qed.

(* One logit for each position orders the trace, but not the variance along (1, 1). *)
Theorem claim_5_direction_example (b := two_tokens (1 // 2) (5 // 9) (4 // 9)) (pi := coins (1 // 3))
    (reward := fun w => token 0 w + token 1 w)
    (f := fun t s a => position_logit t pi s a * advantage 2 reward pi s a)
    (along := fun weight w => 1 * weighted_sum 2 weight (f 0%N) w + 1 * weighted_sum 2 weight (f 1%N) w) :
  Var b 2 [::] (along (cumulative_ratio b pi)) = 16%:R / 3645%:R (* Var Y *) /\
  Var b 2 [::] (along (sequence_ratio b pi)) = 0%:R (* Var Z *).
Proof. solve_all. Qed.

(* With a reward that is not known at its token even the trace is reversed. *)
Theorem claim_5_orthogonal_outcome (b := two_tokens (4 // 5) (1 // 10) (1 // 10))
    (pi := two_tokens (7 // 10) (9 // 10) (9 // 10)) (reward := fun w => 1 - token 1 w)
    (term := fun weight t => with_outcome 2 weight (position_logit t pi) reward) :
  Var b 2 [::] (term (cumulative_ratio b pi) 0%N) + Var b 2 [::] (term (cumulative_ratio b pi) 1%N) = 9981%:R / 40000%:R
    (* rho_t *) /\
  Var b 2 [::] (term (sequence_ratio b pi) 0%N) + Var b 2 [::] (term (sequence_ratio b pi) 1%N) = 181%:R / 40000%:R
    (* rho_H *).
Proof.
have -> : 40000%:R = 200%:R ^+ 2 :> rat by rewrite -natrX; congr _%:R; apply/eqP; vm_compute.
solve_all.
Qed.

(* The recipe of claim_5_zero_variance_sampler makes the b of claim_5_ordered_A. *)
Theorem claim_5_zero_variance_recipe (pi := coins (1 // 3)) (reward := fun w => token 0 w + token 1 w)
    (f := fun s a => shared_logit pi s a * advantage 2 reward pi s a) (b := zero_variance_prob pi 2 f 1) :
  (forall w, size w = 2%N -> 0 < path_sum f w) /\
  [/\ b [::] true = 1%:R / 2%:R (* b(1) *), b [:: false] true = 5%:R / 9%:R (* b(1) after 0 *) &
      b [:: true] true = 4%:R / 9%:R (* b(1) after 1 *)].
Proof.
split.
  case=> [|x [|y [|]]] // _.
  suff -> : path_sum f [:: x; y] = (if x then if y then 8%:R else 5%:R else if y then 5%:R else 2%:R) / 9%:R.
    by case: x y => [] []; rewrite divr_gt0 ?ltr0n.
  by case: x y => [] []; solve_all.
have reach s : reachable pi s.
  elim/last_ind: s => // s a; rewrite reachable_rcons => -> /=.
  by case: a; rewrite /Coins.coin /probability /= ?subr_gt0 ?divr_gt0 ?ltr0n // ltr_pdivr_mulr ?ltr0n // mul1r ltr_nat.
have chosen s (M := value 2 (fun w => 1 * path_sum f w) pi) : (size s < 2)%N ->
    b s true = pi s true * M (rcons s true) / M s.
  by move=> lt_s2; rewrite /b /zero_variance_prob reach lt_s2.
rewrite !chosen // /value.
solve_all.
Qed.

(* Both gradients as polynomials in the step eps, where pi(1) = b(1) + eps. *)
Theorem claim_5_slope_example (b := coins (1 // 3))
    (x := fun (s : seq bool) a => if a then 3%:R else - 3%:R / 2%:R : rat) (pi := moved b x)
    (value := fun reward n s => E pi n s (fun w => (reward w)%:P))
    (g := fun (s : seq bool) a => (a%:R)%:P - pi s true)
    (f := fun reward s a => g s a * (value reward (1 - size s)%N (rcons s a) - value reward (2 - size s)%N s))
    (slope := fun reward => (Var (b_poly b) 2 [::] (sequence_weighted (rho_moved x) (f reward)) -
                             Var (b_poly b) 2 [::] (prefix_weighted (rho_moved x) (f reward)))`_1) :
  (forall s, pi s true = (1 / 3%:R)%:P + 'X) /\
  [/\ slope (fun w => token 0 w + token 1 w) = 4%:R / 27%:R (* R = a1 + a2 *) &
      slope (fun w => token 0 w - token 1 w) = - 4%:R / 27%:R (* R = a1 - a2 *)].
Proof.
split.
  by move=> s; rewrite /pi /moved mul1r; congr (_ + _); rewrite -[RHS]scale1r; congr (_ *: _); compute_number.
have x_score : is_score b x by move=> s; rewrite /next big_bool /= /Coins.coin /probability /=; compute_number.
have f0 reward s a : (f reward s a)`_0 = shared_logit b s a *
    (tree_E b (1 - size s) (rcons s a) reward - tree_E b (2 - size s) s reward).
  rewrite /f /g coefM big_ord1 /= !coefB !moved_coef coefC /= shared_logit_tree.
  by have [-> _] := coef_moved b x s true.
have slopeE reward (f1 := fun s a => shared_logit b s a *
      (tree_E b (1 - size s) (rcons s a) reward - tree_E b (2 - size s) s reward)) :
    slope reward = 2%:R * E b 2 [::] (fun w => step x 1 w * (step f1 0 w * step f1 1 w)).
  have := claim_5_slope 2 x_score (fun _ : 'I_1 => f reward); rewrite big_ord1 -/(slope reward) => ->.
  have only (F : nat -> nat -> nat -> rat) :
      \sum_(i < 2) \sum_(j < 2) \sum_(k < 2 | (i < k <= j)%N) F i j k = F 0%N 1%N 1%N.
    under eq_bigr => i _ do under eq_bigr => j _ do rewrite big_mkcond !big_ord_recl big_ord0.
    by rewrite !big_ord_recl !big_ord0 /= !addr0 !add0r.
  rewrite (only (fun i j k => E b 2 [::] (fun w => step x k w * dot _ i j w))); congr (_ * _).
  apply: eq_E => w _; rewrite /dot big_ord1; congr (_ * (_ * _)).
    by rewrite /step; case: drop => // a v; exact: f0.
  by rewrite /step; case: drop => // a v; exact: f0.
rewrite !slopeE; split; solve_all.
Qed.

(* --- the stop-gradient form --------------------------------------------------------------------------------------- *)

Theorem claim_9_target_advantage_example (b := coins (1 // 2)) (pi := coins (3 // 4)) (A := advantage 2 both pi) :
  [/\ gradient pi (shared_logit pi) 2 both = 9%:R / 32%:R (* true gradient *),
      E b 2 [::] (stop_gradient b pi A) = 9%:R / 32%:R (* stop-gradient *),
      E b 2 [::] (undetached b pi A) = 9%:R / 32%:R (* un-detached *),
      Var b 2 [::] (stop_gradient b pi A) = 243%:R / 16384%:R (* Var of stop-gradient *) &
      Var b 2 [::] (undetached b pi A) = 81%:R / 16384%:R (* Var of un-detached *)].
Proof. solve_all. Qed.

Theorem claim_9_target_advantage_down (b := coins (1 // 2)) (pi := coins (1 // 4)) (A := advantage 2 both pi) :
  Var b 2 [::] (stop_gradient b pi A) = 99%:R / 16384%:R (* Var of stop-gradient *) /\
  Var b 2 [::] (undetached b pi A) = 369%:R / 16384%:R (* Var of un-detached *).
Proof. solve_all. Qed.

Theorem claim_9_behavior_advantage_example (b := coins (1 // 2)) (pi := coins (3 // 4)) (A := advantage 2 both b) :
  [/\ gradient pi (shared_logit pi) 2 both = 9%:R / 32%:R (* true gradient *),
      E b 2 [::] (stop_gradient b pi A) = 15%:R / 64%:R (* stop-gradient *),
      E b 2 [::] (undetached b pi A) = 9%:R / 32%:R (* un-detached *),
      Var b 2 [::] (stop_gradient b pi A) = 81%:R / 4096%:R (* Var of stop-gradient *) &
      Var b 2 [::] (undetached b pi A) = 27%:R / 512%:R (* Var of un-detached *)].
Proof. solve_all. Qed.

Theorem claim_9_action_value_example (b := coins (1 // 2)) (pi := coins (3 // 4)) (A := action_value 2 both pi) :
  [/\ gradient pi (shared_logit pi) 2 both = 9%:R / 32%:R (* true gradient *),
      E b 2 [::] (stop_gradient b pi A) = 9%:R / 32%:R (* stop-gradient *),
      E b 2 [::] (undetached b pi A) = 27%:R / 64%:R (* un-detached *),
      Var b 2 [::] (stop_gradient b pi A) = 243%:R / 2048%:R (* Var of stop-gradient *) &
      Var b 2 [::] (undetached b pi A) = 1377%:R / 4096%:R (* Var of un-detached *)].
Proof. solve_all. Qed.

Theorem claim_9_outcome_example (b := coins (1 // 2)) (pi := coins (3 // 4)) (g := shared_logit pi)
    (weight := cumulative_ratio b pi) :
  [/\ gradient pi g 2 both = 9%:R / 32%:R (* true gradient *),
      E b 2 [::] (with_outcome 2 weight g both) = 15%:R / 64%:R (* stop-gradient *) &
      E b 2 [::] (undetached_sum 2 weight (fun=> both) g) = 3%:R / 8%:R (* un-detached *)].
Proof. solve_all. Qed.

(* On-policy already the un-detached form is wrong with R, and its sign can be. *)
Theorem claim_9_outcome_on_policy (pi := coins (1 // 2)) (g := shared_logit pi) (weight := cumulative_ratio pi pi)
    (R1 := token 0) (R2 := fun w => 2%:R * token 0 w - 3%:R * token 1 w) :
  [/\ gradient pi g 2 R1 = 1%:R / 4%:R (* true gradient, R = a1 *),
      E pi 2 [::] (with_outcome 2 weight g R1) = 1%:R / 4%:R (* stop-gradient, R = a1 *) &
      E pi 2 [::] (undetached_sum 2 weight (fun=> R1) g) = 1%:R / 2%:R (* un-detached, R = a1 *)] /\
  [/\ gradient pi g 2 R2 = - 1%:R / 4%:R (* true gradient, R = 2 a1 - 3 a2 *),
      E pi 2 [::] (with_outcome 2 weight g R2) = - 1%:R / 4%:R (* stop-gradient, R = 2 a1 - 3 a2 *) &
      E pi 2 [::] (undetached_sum 2 weight (fun=> R2) g) = 1%:R / 4%:R (* un-detached, R = 2 a1 - 3 a2 *)].
Proof. solve_all. Qed.

(* The mode with rho_t^(1/t): its gradient rho_t^(1/t) g_t is not the derivative (1/t) rho_t^(1/t) sum_{k <= t} g_k. *)
Theorem claim_9_mean_form_example (b := coins (1 // 5)) (pi := coins (4 // 5)) (reward := both)
    (g := shared_logit pi) (A := advantage 2 reward pi)
    (root := fun (s : seq bool) (a : bool) => if a then 2%:R else 1 / 2%:R : rat)
    (weight := mean_root b pi root) :
  [/\ gradient pi g 2 reward = 32%:R / 125%:R (* true gradient *),
      E b 2 [::] (weighted_sum 2 weight (fun s a => A s a * g s a)) = 148%:R / 625%:R (* released mode *) &
      E b 2 [::] (undetached_sum 2 (fun t w => weight t w / t.+1%:R) (step A) g) = 108%:R / 625%:R
        (* derivative of rho_t^(1/t) *)].
Proof. solve_all. Qed.

(* --- the dual bound of the released code -------------------------------------------------------------------------- *)

(* What the printed formula leaves of a token, and what is left if the upper end of the window, as in the released code,
   is a bound for A < 0 too. *)
Definition printed (window : rat * rat) (weight A : rat) : rat := if clipped window weight A then 0 else weight * A.
Definition with_dual (window : rat * rat) (weight A : rat) : rat :=
  if A < 0 then if above window.2 weight then 0 else printed window weight A else printed window weight A.

(* Both depend on the window only by what is compared with its ends. *)
Lemma same_window (low high low' high' weight A : rat) :
  (A < 0 -> (weight < low) = (weight < low')) -> (high < weight) = (high' < weight) ->
  (printed (low, high) weight A = printed (low', high') weight A) *
  (with_dual (low, high) weight A = with_dual (low', high') weight A).
Proof.
rewrite /with_dual /printed /clipped /above /= => same_low ->; have [A_lt0|] := boolP (A < 0); last by [].
by rewrite same_low.
Qed.

(* Two tokens, one of them bad, in any window from at most 1 to less than 3/2, as exp(-1/40) to exp(1/20) is: the dual
   bound takes away the bad token, and a quarter of the gradient. *)
Theorem claim_10_dual_drifted (low high : rat) (b := coins (1 // 2)) (pi := coins (3 // 4))
    (reward := fun w => 1 - token 0 w) (A := advantage 1 reward pi) (g := shared_logit pi)
    (kept := fun left_of : rat * rat -> rat -> rat -> rat =>
       E b 1 [::] (fun w => left_of (low, high) (rho b pi w) (step A 0 w) * step g 0 w)) :
  low <= 1 -> 1 <= high < 3%:R / 2%:R ->
  [/\ gradient pi g 1 reward = - 3%:R / 16%:R (* true gradient *),
      kept printed = - 3%:R / 16%:R (* printed window *) &
      kept with_dual = - 9%:R / 64%:R (* with the dual bound *)].
Proof.
move=> low_le /andP[high_ge high_lt].
have rhoE (x : bool) : rho b pi [:: x] = if x then 3%:R / 2%:R else 1 / 2%:R.
  by rewrite rho_one_token; case: x; rewrite /ratio /= /Coins.coin /probability /=; compute_number.
have good : (step A 0 [:: false] < 0) = false.
  by rewrite (_ : step A 0 [:: false] = 3%:R / 4%:R); [decide_comparisons | solve_all].
have [lt_half lt_three] : 1 / 2%:R < 1 :> rat /\ 1 < 3%:R / 2%:R :> rat by split; decide_comparisons.
have same w : size w = 1%N ->
    (printed (low, high) (rho b pi w) (step A 0 w) = printed (1, 1) (rho b pi w) (step A 0 w)) *
    (with_dual (low, high) (rho b pi w) (step A 0 w) = with_dual (1, 1) (rho b pi w) (step A 0 w)).
  case: w => [|x [|]] // _; apply: same_window; rewrite rhoE; case: x; cbv iota.
  - by move=> _; rewrite !ltNge (le_trans low_le) ?ltW.
  - by rewrite good.
  - by rewrite high_lt lt_three.
  by rewrite !ltNge (le_trans _ high_ge) ?ltW.
have [-> ->] : kept printed = E b 1 [::] (fun w => printed (1, 1) (rho b pi w) (step A 0 w) * step g 0 w) /\
    kept with_dual = E b 1 [::] (fun w => with_dual (1, 1) (rho b pi w) (step A 0 w) * step g 0 w).
  by split; apply: eq_E => w sz_w; rewrite !same.
by rewrite /with_dual /printed; clear; solve_all.
Qed.

(* One of three tokens, the first the worst, in any window from at most 48/49 to less than 2: the dual bound turns the
   gradient of its logit around. *)
Theorem claim_10_dual_sign (low high : rat) (b := @one_of_three 1 1 98 isT) (pi := @one_of_three 2 2 96 isT)
    (reward := fun h : seq 'I_3 => if h is c :: _ then nth 0 [:: 1 / 4%:R; 1; 1 / 2%:R] c else 0)
    (A := advantage 1 reward pi) (g := softmax_score pi (fun=> tt) tt (@Ordinal 3 0 isT))
    (kept := fun left_of : rat * rat -> rat -> rat -> rat =>
       E b 1 [::] (fun h => left_of (low, high) (rho b pi h) (step A 0 h) * step g 0 h)) :
  low <= 48%:R / 49%:R -> 1 <= high < 2%:R ->
  [/\ gradient pi g 1 reward = - 51%:R / 10000%:R (* true gradient *),
      kept printed = - 2451%:R / 500000%:R (* printed window *) &
      kept with_dual = 3%:R / 31250%:R (* with the dual bound *)].
Proof.
move=> low_le /andP[high_ge high_lt].
pose c0 : 'I_3 := @Ordinal 3 0 isT; pose c1 : 'I_3 := @Ordinal 3 1 isT; pose c2 : 'I_3 := @Ordinal 3 2 isT.
have [rho0 rho1 rho2] : [/\ rho b pi [:: c0] = 2%:R, rho b pi [:: c1] = 2%:R & rho b pi [:: c2] = 48%:R / 49%:R].
  by rewrite !rho_one_token /ratio /= /three_prob; split; compute_number.
have [A0 A1 A2] : [/\ A [::] c0 = - 51%:R / 200%:R, A [::] c1 = 99%:R / 200%:R & A [::] c2 = - 1%:R / 200%:R].
  by rewrite /A /advantage /action_value /value /= big_three /= /three_prob; split; compute_number.
have [g0 g1 g2] : [/\ g [::] c0 = 49%:R / 50%:R, g [::] c1 = - 1%:R / 50%:R & g [::] c2 = - 1%:R / 50%:R].
  by rewrite /g /softmax_score eqxx /= /three_prob; split; compute_number.
have keptE left_of : kept left_of =
    (left_of (low, high) 2%:R (- 51%:R / 200%:R) * (49%:R / 50%:R) +
     left_of (low, high) 2%:R (99%:R / 200%:R) * (- 1%:R / 50%:R) +
     98%:R * left_of (low, high) (48%:R / 49%:R) (- 1%:R / 200%:R) * (- 1%:R / 50%:R)) / 100%:R.
  rewrite /kept /E big_three /step /= -/c0 -/c1 -/c2.
  rewrite rho0 rho1 rho2 A0 A1 A2 g0 g1 g2 /three_prob /=.
  by move: (left_of _ _ _) (left_of _ _ _) (left_of _ _ _) => x y z; field.
have [lt1 lt2] : 48%:R / 49%:R < 1 :> rat /\ 1 < 2%:R :> rat by split; decide_comparisons.
have same2 A' : (printed (low, high) 2%:R A' = printed (1, 1) 2%:R A') *
                (with_dual (low, high) 2%:R A' = with_dual (1, 1) 2%:R A').
  apply: same_window => [_|]; last by rewrite high_lt lt2.
  by rewrite !ltNge (le_trans low_le) ?ltW // (lt_trans lt1).
have same1 A' : (printed (low, high) (48%:R / 49%:R) A' = printed (48%:R / 49%:R, 1) (48%:R / 49%:R) A') *
                (with_dual (low, high) (48%:R / 49%:R) A' = with_dual (48%:R / 49%:R, 1) (48%:R / 49%:R) A').
  apply: same_window => [_|]; first by rewrite ltxx ltNge low_le.
  by rewrite ltNge (le_trans (ltW lt1) high_ge) ltNge (ltW lt1).
split; first by rewrite gradient_one_token big_three -/c0 -/c1 -/c2 g0 g1 g2 /= /three_prob; compute_number.
  by rewrite keptE !same2 same1 /printed; decide_comparisons; compute_number.
by rewrite keptE !same2 same1 /with_dual /printed; decide_comparisons; compute_number.
Qed.

(* --- rollout correction ------------------------------------------------------------------------------------------- *)

(* Sampler mu, old policy b, target pi: the correction b/mu of the whole string, or of the prefix. *)
Theorem claim_11_prefix_example (mu := coins (1 // 2)) (b := coins (3 // 5)) (pi := coins (3 // 4)) :
  Var mu 2 [::] (fun w => rho mu b w * rho b pi (take 1 w)) = 3%:R / 10%:R (* sequence correction *) /\
  Var mu 2 [::] (fun w => rho mu b (take 1 w) * rho b pi (take 1 w)) = 1%:R / 4%:R (* prefix correction *).
Proof. solve_all. Qed.

(* Before the first update, pi = b, an outcome reward needs the correction of the whole string. *)
Theorem claim_11_prefix_outcome (mu := coins (1 // 4)) (b := coins (1 // 2)) (g := shared_logit b)
    (equal := fun w => both w + (1 - token 0 w) * (1 - token 1 w)) :
  [/\ gradient b g 2 both = 1%:R / 4%:R (* true gradient, R = a1 a2 *),
      E mu 2 [::] (with_outcome 2 (cumulative_ratio mu b) g both) = 3%:R / 16%:R (* prefix correction, R = a1 a2 *) &
      E mu 2 [::] (with_outcome 2 (sequence_ratio mu b) g both) = 1%:R / 4%:R (* sequence correction, R = a1 a2 *)] /\
  [/\ gradient b g 2 equal = 0%:R (* true gradient, R = 1 if equal *),
      E mu 2 [::] (with_outcome 2 (cumulative_ratio mu b) g equal) = - 1%:R / 8%:R
        (* prefix correction, R = 1 if equal *) &
      E mu 2 [::] (with_outcome 2 (sequence_ratio mu b) g equal) = 0%:R (* sequence correction, R = 1 if equal *)].
Proof. solve_all. Qed.

Theorem claim_11_none_example (mu := coins (1 // 2)) (b := coins (3 // 5)) (pi := coins (3 // 4)) :
  E mu 1 [::] (rho b pi) = 15%:R / 16%:R (* E rho_1 *) /\ E mu 2 [::] (rho b pi) = 225%:R / 256%:R (* E rho_2 *).
Proof. solve_all. Qed.

(* Before the first update too, when rho_t = 1 everywhere. *)
Theorem claim_11_none_gradient (mu := coins (1 // 2)) (b := coins (3 // 5)) (reward := both)
    (f := fun s a => shared_logit b s a * advantage 2 reward b s a) :
  gradient b (shared_logit b) 2 reward = 36%:R / 125%:R (* true gradient *) /\
  E mu 2 [::] (path_sum f) = 143%:R / 500%:R (* no correction *).
Proof. solve_all. Qed.

Theorem claim_11_sequence_cap_example (mu := coins (1 // 10)) (b := coins (3 // 5))
    (f := fun s a => shared_logit b s a * advantage 1 (token 0) b s a)
    (weight := fun w => truncated 5%:R (rho mu b w)) :
  [/\ E mu 1 [::] weight = 9%:R / 10%:R (* mean weight *),
      gradient b (shared_logit b) 1 (token 0) = 6%:R / 25%:R (* true gradient *) &
      E mu 1 [::] (fun w => weight w * path_sum f w) = 28%:R / 125%:R (* capped *)].
Proof. solve_all. Qed.

Theorem claim_11_masked_example (mu := coins (1 // 2)) (b := coins (11 // 20))
    (cut := fun w => truncated 1 (rho mu b w))
    (dropped := fun w => masked 1 (rho mu b w)) :
  [/\ E mu 1 [::] (rho mu b) = 1%:R (* mean *),
      E mu 1 [::] cut = 19%:R / 20%:R (* mean, truncated *) &
      E mu 1 [::] dropped = 9%:R / 20%:R (* mean, masked *)] /\
  [/\ Var mu 1 [::] (rho mu b) = 1%:R / 100%:R (* Var *),
      Var mu 1 [::] cut = 1%:R / 400%:R (* Var, truncated *) &
      Var mu 1 [::] dropped = 81%:R / 400%:R (* Var, masked *)].
Proof. solve_all. Qed.

(* The sampler mu is corrected towards b by the ratio of the token, of the prefix or of the whole string, exact, cut at
   11/10 or dropped above that. *)
Theorem claim_11_levels_example (mu := coins (1 // 2)) (b := coins (3 // 5)) (pi := coins (3 // 4))
    (reward := fun w => token 0 w * token 1 w * token 2 w) (g := shared_logit pi)
    (sum := fun correction => weighted_sum 3 (fun t w => correction t w * cumulative_ratio b pi t w)
       (fun s a => g s a * advantage 3 reward pi s a))
    (bias := fun correction => E mu 3 [::] (sum correction) - gradient pi g 3 reward)
    (spread := fun correction => Var mu 3 [::] (sum correction))
    (none := fun (t : nat) w => 1)
    (level := fun (treat : rat -> rat) (ratio : binary_policy -> binary_policy -> nat -> seq bool -> rat) t w =>
       treat (ratio mu b t w))
    (exact := level id) (cut := level (truncated (11%:R / 10%:R))) (dropped := level (masked (11%:R / 10%:R))) :
  gradient pi g 3 reward = 81%:R / 256%:R (* true gradient *) /\
  bias none = - 179%:R / 16384%:R (* bias, none exact *) /\
  [/\ bias (exact token_ratio) = - 51%:R / 1024%:R (* bias, token exact *),
      bias (cut token_ratio) = - 907%:R / 16384%:R (* bias, token truncated *) &
      bias (dropped token_ratio) = - 477%:R / 4096%:R (* bias, token masked *)] /\
  [/\ bias (exact cumulative_ratio) = 0%:R (* bias, prefix exact *),
      bias (cut cumulative_ratio) = - 707%:R / 32768%:R (* bias, prefix truncated *) &
      bias (dropped cumulative_ratio) = - 81%:R / 512%:R (* bias, prefix masked *)] /\
  [/\ bias (exact sequence_ratio) = 0%:R (* bias, sequence exact *),
      bias (cut sequence_ratio) = - 21977%:R / 819200%:R (* bias, sequence truncated *) &
      bias (dropped sequence_ratio) = - 2943%:R / 12800%:R (* bias, sequence masked *)] /\
  spread none = 6388975%:R / 268435456%:R (* Var, none exact *) /\
  [/\ spread (exact token_ratio) = 9873%:R / 524288%:R (* Var, token exact *),
      spread (cut token_ratio) = 4762975%:R / 268435456%:R (* Var, token truncated *) &
      spread (dropped token_ratio) = 235791%:R / 16777216%:R (* Var, token masked *)] /\
  [/\ spread (exact cumulative_ratio) = 10935%:R / 262144%:R (* Var, prefix exact *),
      spread (cut cumulative_ratio) = 37255327%:R / 1073741824%:R (* Var, prefix truncated *) &
      spread (dropped cumulative_ratio) = 6561%:R / 524288%:R (* Var, prefix masked *)] /\
  [/\ spread (exact sequence_ratio) = 343359%:R / 8192000%:R (* Var, sequence exact *),
      spread (cut sequence_ratio) = 4878191387%:R / 134217728000%:R (* Var, sequence truncated *) &
      spread (dropped sequence_ratio) = 322947%:R / 32768000%:R (* Var, sequence masked *)].
Proof. solve_all. Qed.
