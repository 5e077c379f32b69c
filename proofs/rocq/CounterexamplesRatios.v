(* The counterexamples of the cumulative ratio, of the other ratios and of the effective sample size.

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

(* --- support and survivors ---------------------------------------------------------------------------------------- *)

(* Absolute continuity fails: b writes token 1 only, pi both with 1/2. *)
Theorem claim_1_support_example (b := coins (1 // 1)) (pi := coins (1 // 2)) :
  [/\ E b 1 [::] (rho b pi) = 1%:R / 2%:R (* E rho_1 *),
      E b 2 [::] (rho b pi) = 1%:R / 4%:R (* E rho_2 *) &
      E b 3 [::] (rho b pi) = 1%:R / 8%:R (* E rho_3 *)].
Proof. solve_all. Qed.

(* It fails at the second token only: the variance falls. *)
Theorem claim_1_support_order (b := two_tokens (1 // 2) (1 // 1) (1 // 1))
    (pi := two_tokens (3 // 4) (1 // 2) (1 // 2)) :
  Var b 1 [::] (rho b pi) = 1%:R / 4%:R (* Var rho_1 *) /\
  Var b 2 [::] (rho b pi) = 1%:R / 16%:R (* Var rho_2 *).
Proof. solve_all. Qed.

(* One of three tokens, from a sampler that cuts the least likely one off. The mean ratio is 1 only if both policies are
   scored after the cut, or, with the policies as they were before it, if they are the same. *)
Theorem claim_1_support_scored_after_cut (b := @one_of_three 5 3 2 isT) (pi := @one_of_three 8 7 5 isT)
    (b_cut := @one_of_three 5 3 0 isT) (pi_cut := @one_of_three 8 7 0 isT)
    (is_cut := fun p q : policy rat_realFieldType [finType of 'I_3] =>
       forall h c, q h c = if (c < 2)%N then p h c / \sum_(x : 'I_3 | (x < 2)%N) p h x else 0) :
  is_cut b b_cut /\ is_cut pi pi_cut /\
  [/\ E b_cut 1 [::] (rho b_cut pi) = 3%:R / 4%:R (* sampler alone *),
      E b_cut 1 [::] (rho b pi) = 15%:R / 16%:R (* neither *),
      E b_cut 1 [::] (rho b b) = 1%:R (* neither, pi = b *) &
      E b_cut 1 [::] (rho b_cut pi_cut) = 1%:R (* both *)].
Proof.
rewrite {}/is_cut; split; last split.
- by move=> h [[|[|[]]] lt_c] //; rewrite big_mkcond big_three /= /three_prob /=; compute_number.
- by move=> h [[|[|[]]] lt_c] //; rewrite big_mkcond big_three /= /three_prob /=; compute_number.
by split; rewrite /= big_three !rho_one_token /ratio /= /three_prob /=; compute_number.
Qed.

(* Among the strings that go on after t tokens the mean ratio is not 1, and its variance falls. *)
Theorem claim_1_survivors_example (b := stop_or_go (1 // 2) (1 // 2)) (pi := stop_or_go (3 // 4) (1 // 2))
    (alive := fun t w => all (fun a => a) (take t w)) :
  [/\ mean_given b 1 (alive 0%N) (rho b pi) = 1%:R (* E rho_1 given alive *),
      mean_given b 2 (alive 1%N) (rho b pi) = 3%:R / 2%:R (* E rho_2 given alive *) &
      mean_given b 3 (alive 2%N) (rho b pi) = 3%:R / 2%:R (* E rho_3 given alive *)] /\
  [/\ Var_given b 1 (alive 0%N) (rho b pi) = 1%:R / 4%:R (* Var rho_1 given alive *),
      Var_given b 2 (alive 1%N) (rho b pi) = 0%:R (* Var rho_2 given alive *) &
      Var_given b 3 (alive 2%N) (rho b pi) = 0%:R (* Var rho_3 given alive *)].
Proof. solve_all. Qed.

(* If only the second token matters, the mean of rho_2 given that token is the better weight. *)
Theorem claim_1_optimal_merged_example (b := coins (1 // 2)) (pi := coins (3 // 4))
    (given := fun a => mean_given b 2 (fun w => if a then nth false w 1 else ~~ nth false w 1) (rho b pi)) :
  Var b 2 [::] (rho b pi) = 9%:R / 16%:R (* Var rho_2 *) /\
  Var b 2 [::] (fun w => given (nth false w 1)) = 1%:R / 4%:R (* Var of E[rho_2 given a_2] *).
Proof. solve_all. Qed.

(* The variance of log2 rho_t can fall: log2 of the token ratios is log_ratio. *)
Theorem claim_1_log_example (b := two_tokens (4 // 5) (2 // 3) (1 // 2)) (pi := two_tokens (1 // 5) (1 // 3) (1 // 2))
    (log_ratio := fun (s : seq bool) (a : bool) => match s with
       | [::] => if a then - 2%:Z else 2%:Z | false :: _ => if a then - 1%:Z else 1%:Z | _ => 0%:Z end) :
  (forall s a, ratio b pi s a = 2%:R ^ log_ratio s a) /\
  Var b 1 [::] (path_sum (fun s a => (log_ratio s a)%:~R)) = 64%:R / 25%:R (* Var log2 rho_1 *) /\
  Var b 2 [::] (path_sum (fun s a => (log_ratio s a)%:~R)) = 524%:R / 225%:R (* Var log2 rho_2 *).
Proof.
split; last by solve_all.
by case=> [|[] ?] []; rewrite -?exprnN -?exprnP /ratio /= /Coins.coin /probability /=; field.
Qed.

(* --- strictness --------------------------------------------------------------------------------------------------- *)

(* The policies differ after a first token 0, which b writes and pi never does: pi's variance stops growing. *)
Theorem claim_1s_strict_example (b := coins (1 // 2)) (pi := two_tokens (1 // 1) (9 // 10) (1 // 2)) :
  [/\ Var b 1 [::] (rho b pi) = 1%:R (* Var rho_1 *),
      Var b 2 [::] (rho b pi) = 1%:R (* Var rho_2 *) &
      Var b 2 [::] (step (ratio b pi) 1) = 8%:R / 25%:R (* Var r_2 *)].
Proof. solve_all. Qed.

(* --- the product formula ------------------------------------------------------------------------------------------ *)

(* chi2 = 1/4 only after the prefix that pi prefers: the variance is above the product formula. *)
Theorem claim_2_general_more (b := coins (1 // 2)) (pi := two_tokens (3 // 4) (1 // 2) (3 // 4)) :
  Var b 2 [::] (rho b pi) = 17%:R / 32%:R (* Var rho_2 *) /\
  marginal_product b pi 2 = 13%:R / 32%:R (* product formula *).
Proof. solve_all. Qed.

(* Only after the other one: the variance is below it. *)
Theorem claim_2_general_less (b := coins (1 // 2)) (pi := two_tokens (3 // 4) (3 // 4) (1 // 2)) :
  Var b 2 [::] (rho b pi) = 9%:R / 32%:R (* Var rho_2 *) /\
  marginal_product b pi 2 = 13%:R / 32%:R (* product formula *).
Proof. solve_all. Qed.

(* After both: equal. *)
Theorem claim_2_general_iid (b := coins (1 // 2)) (pi := coins (3 // 4)) :
  Var b 2 [::] (rho b pi) = 9%:R / 16%:R (* Var rho_2 *) /\
  marginal_product b pi 2 = 9%:R / 16%:R (* product formula *).
Proof. solve_all. Qed.

(* The second token's ratios depend on the first token, chi2 does not. *)
Theorem claim_2_product_constant_chi2 (b := two_tokens (1 // 2) (1 // 2) (4 // 5))
    (pi := two_tokens (3 // 4) (3 // 4) (3 // 5)) :
  Var b 2 [::] (rho b pi) = 9%:R / 16%:R (* Var rho_2 *) /\
  marginal_product b pi 2 = 9%:R / 16%:R (* product formula *).
Proof. solve_all. Qed.

(* --- the growth of the variance ----------------------------------------------------------------------------------- *)

(* Five independent tokens: the last variance as a multiple of that of t tokens, and what the growth per token and the
   number of tokens alone would give. *)
Theorem claim_2r_limit_five_tokens (b := coins (1 // 2)) (pi := coins (3 // 4)) (d := chi2 b pi [::])
    (growth := fun t => Var b 5 [::] (rho b pi) / Var b t [::] (rho b pi)) :
  [/\ growth 1%N = 2101%:R / 256%:R (* t = 1 *), growth 2%N = 2101%:R / 576%:R (* t = 2 *),
      growth 3%N = 2101%:R / 976%:R (* t = 3 *), growth 4%N = 2101%:R / 1476%:R (* t = 4 *) &
      growth 5%N = 1%:R (* t = 5 *)] /\
  (1 + d) ^+ (5 - 1) = 625%:R / 256%:R (* (1+d)^(H-t) at t = 1 *) /\ (5%:R : rat) / 1%:R = 5%:R (* H/t at t = 1 *).
Proof. solve_all. Qed.

(* --- the other ratios with the exact A^pi ------------------------------------------------------------------------- *)

(* R(11) = 1, R(01) = -1: the token ratio's gradient has the wrong sign, the two length-normalized ones' is 0. *)
Theorem claim_3_token_sign (b := two_tokens (1 // 5) (1 // 2) (1 // 2)) (pi := two_tokens (4 // 5) (1 // 2) (1 // 2))
    (reward := fun w => (2%:R * token 0 w - 1) * token 1 w)
    (f := fun s a => position_logit 1 pi s a * advantage 2 reward pi s a)
    (root := fun (s : seq bool) (a : bool) => if s is [::] then if a then 2%:R else 1 / 2%:R else 1 : rat) :
  (forall s a, 0 <= root s a /\ root s a ^+ 2 = ratio b pi s a) /\
  [/\ gradient pi (position_logit 1 pi) 2 reward = 3%:R / 20%:R (* true gradient *),
      E b 2 [::] (weighted_sum 2 (token_ratio b pi) f) = - 3%:R / 20%:R (* r_t *),
      E b 2 [::] (weighted_sum 2 (fun=> path_prod root) f) = 0%:R (* GSPO rho_H^(1/2) *) &
      E b 2 [::] (weighted_sum 2 (mean_root b pi root) f) = 0%:R (* rho_t^(1/t) *)].
Proof.
split; last by solve_all.
by case=> [|[] ?] []; split=> //; rewrite /ratio /= /Coins.coin /probability /=; field.
Qed.

(* Six weights on one shared logit, with the exact A^pi and with the outcome reward. *)
Theorem claim_3_table (b := coins (1 // 5)) (pi := coins (4 // 5)) (reward := both)
    (g := shared_logit pi) (f := fun s a => g s a * advantage 2 reward pi s a)
    (root := fun (s : seq bool) (a : bool) => if a then 2%:R else 1 / 2%:R : rat) :
  [/\ forall s a, 0 <= root s a /\ root s a ^+ 2 = ratio b pi s a,
      gradient pi g 2 reward = 32%:R / 125%:R (* true gradient *),
      [/\ [/\ E b 2 [::] (weighted_sum 2 (cumulative_ratio b pi) f) = 32%:R / 125%:R (* rho_t with A^pi *),
              E b 2 [::] (weighted_sum 2 (token_ratio b pi) f) = 4%:R / 25%:R (* r_t with A^pi *) &
              E b 2 [::] (weighted_sum 2 (sequence_ratio b pi) f) = 32%:R / 125%:R (* rho_H with A^pi *)],
          E b 2 [::] (weighted_sum 2 (fun=> path_prod root) f) = 884%:R / 3125%:R (* GSPO rho_H^(1/2) with A^pi *),
          E b 2 [::] (weighted_sum 2 (mean_root b pi root) f) = 148%:R / 625%:R (* rho_t^(1/t) with A^pi *) &
          E b 2 [::] (path_sum f) = 13%:R / 25%:R (* none with A^pi *)] &
      [/\ [/\ E b 2 [::] (with_outcome 2 (cumulative_ratio b pi) g reward) = 4%:R / 25%:R (* rho_t with R *),
              E b 2 [::] (with_outcome 2 (token_ratio b pi) g reward) = 8%:R / 125%:R (* r_t with R *) &
              E b 2 [::] (with_outcome 2 (sequence_ratio b pi) g reward) = 32%:R / 125%:R (* rho_H with R *)],
          E b 2 [::] (with_outcome 2 (fun=> path_prod root) g reward) = 8%:R / 125%:R (* GSPO rho_H^(1/2) with R *),
          E b 2 [::] (with_outcome 2 (mean_root b pi root) g reward) = 8%:R / 125%:R (* rho_t^(1/t) with R *) &
          E b 2 [::] (fun w => path_sum g w * reward w) = 2%:R / 125%:R (* none with R *)]].
Proof.
split; try by solve_all.
by move=> s []; split=> //; rewrite /ratio /= /Coins.coin /probability /=; field.
Qed.

(* In that world rho_2^(1/2) makes of b the uniform law of the four strings, scaled by Z < 1. *)
Theorem claim_3_gspo_example (b := coins (1 // 5))
    (root := fun (s : seq bool) (a : bool) => if a then 2%:R else 1 / 2%:R : rat)
    (Z := E b 2 [::] (path_prod root)) (q := fun w => string_prob b w * path_prod root w / Z) :
  [/\ Z = 16%:R / 25%:R (* Z *),
      q [:: false; false] = 1%:R / 4%:R (* q(00) *), q [:: false; true] = 1%:R / 4%:R (* q(01) *),
      q [:: true; false] = 1%:R / 4%:R (* q(10) *) & q [:: true; true] = 1%:R / 4%:R (* q(11) *)].
Proof. solve_all. Qed.

(* All that differs is the first token, all that is worth something the second: with the exact A^pi the token ratio's
   gradient, over both logits of each softmax, varies 16 times as much as the cumulative ratio's. *)
Theorem claim_T1_noisy_token_ratio (b := two_tokens (4 // 5) (1 // 2) (1 // 2))
    (pi := two_tokens (1 // 5) (1 // 2) (1 // 2)) (reward := fun w => token 0 w * (2%:R * token 1 w - 1))
    (f := fun k x s a => prefix_logit k x pi s a * advantage 2 reward pi s a)
    (total := fun weight => \sum_(k <- [:: [::]; [:: false]; [:: true]])
       (Var b 2 [::] (weighted_sum 2 weight (f k false)) + Var b 2 [::] (weighted_sum 2 weight (f k true)))) :
  [/\ total (token_ratio b pi) = 2%:R / 25%:R (* r_t *),
      total (cumulative_ratio b pi) = 1%:R / 200%:R (* rho_t *) &
      total (sequence_ratio b pi) = 1%:R / 200%:R (* rho_H *)].
Proof. by rewrite {}/total !big_cons !big_nil; solve_all. Qed.

(* --- effective sample size ---------------------------------------------------------------------------------------- *)

(* The batch {10, 01}: its effective sample size rises. *)
Theorem claim_8_batch_example (b := coins (1 // 2)) (pi := coins (3 // 4))
    (ess := fun t => pair_ess (rho b pi (take t [:: true; false])) (rho b pi (take t [:: false; true]))) :
  ess 1%N = 8%:R / 5%:R (* t = 1 *) /\ ess 2%N = 2%:R (* t = 2 *).
Proof. solve_all. Qed.

Theorem claim_8_population_example (b := coins (1 // 2)) (pi := coins (3 // 4))
    (ess := fun t => 1 / E b t [::] (fun w => rho b pi w ^+ 2)) :
  [/\ ess 1%N = 4%:R / 5%:R (* t = 1 *), ess 2%N = 16%:R / 25%:R (* t = 2 *), ess 3%N = 64%:R / 125%:R (* t = 3 *) &
      ess 4%N = 256%:R / 625%:R (* t = 4 *)].
Proof. solve_all. Qed.

(* The expected effective sample size of a batch of two, which falls. *)
Theorem claim_8_batch_expected (b := coins (1 // 2)) (pi := coins (3 // 4))
    (ess := fun t => pair_mean b t (fun u v => pair_ess (rho b pi u) (rho b pi v))) :
  [/\ ess 1%N = 9%:R / 5%:R (* t = 1 *), ess 2%N = 349%:R / 205%:R (* t = 2 *) &
      ess 3%N = 24501%:R / 14965%:R (* t = 3 *)].
Proof. solve_all. Qed.
