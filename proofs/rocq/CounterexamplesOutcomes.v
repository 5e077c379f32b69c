(* The counterexamples of outcome rewards.

   Every theorem gives the numbers of one small world over the rationals, with the definitions of Trees.v, Gradients.v,
   OutcomeReward.v and Rationals.v. The comment after each number is its name in proofs/counterexamples.json. *)

From mathcomp Require Import all_ssreflect all_algebra ring.
From ctpo Require Import Trees Gradients OutcomeReward Rationals.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Implicit Types (s w : seq bool) (a : bool).

(* --- outcome rewards ---------------------------------------------------------------------------------------------- *)

(* R = 1 if both tokens agree: with the cumulative ratio the first logit's gradient has the wrong sign. *)
Theorem claim_4_unbiased_sign (b := two_tokens (1 // 2) (1 // 4) (1 // 4)) (pi := two_tokens (1 // 2) (3 // 4) (3 // 4))
    (reward := fun w => token 0 w * token 1 w + (1 - token 0 w) * (1 - token 1 w)) :
  [/\ gradient pi (position_logit 0 pi) 2 reward = 1%:R / 8%:R (* true gradient *),
      E b 2 [::] (with_outcome 2 (cumulative_ratio b pi) (position_logit 0 pi) reward) = - 1%:R / 8%:R
        (* cumulative ratio *),
      gradient pi (position_logit 1 pi) 2 reward = 0%:R (* true gradient, second logit *) &
      E b 2 [::] (with_outcome 2 (cumulative_ratio b pi) (position_logit 1 pi) reward) = 0%:R
        (* cumulative ratio, second logit *)].
Proof. solve_all. Qed.

Theorem claim_4_unbiased_both_ones (b := coins (1 // 2)) (pi := coins (3 // 4)) (reward := both) :
  gradient pi (position_logit 0 pi) 2 reward = 9%:R / 64%:R (* true gradient *) /\
  E b 2 [::] (with_outcome 2 (cumulative_ratio b pi) (position_logit 0 pi) reward) = 3%:R / 32%:R
    (* cumulative ratio *).
Proof. solve_all. Qed.

(* A reward that is a sum over independent tokens alike has no bias. *)
Theorem claim_4_additive_example (b := coins (1 // 2)) (pi := coins (3 // 4))
    (reward := fun w => token 0 w + token 1 w + token 2 w) (estimate := fun t => E b 3 [::]
       (with_outcome 3 (cumulative_ratio b pi) (position_logit t pi) reward)) :
  [/\ gradient pi (position_logit 0 pi) 3 reward = 3%:R / 16%:R (* true gradient *),
      gradient pi (position_logit 1 pi) 3 reward = 3%:R / 16%:R &
      gradient pi (position_logit 2 pi) 3 reward = 3%:R / 16%:R] /\
  [/\ estimate 0%N = 3%:R / 16%:R (* cumulative ratio *), estimate 1%N = 3%:R / 16%:R & estimate 2%N = 3%:R / 16%:R].
Proof. solve_all. Qed.

(* The first token's term alone can vary more under its prefix's ratio than under the whole string's. *)
Theorem claim_4_variance_terms (b := coins (1 // 2)) (pi := fun q => two_tokens (1 // 2) q q)
    (reward := both)
    (prefix := fun q => with_outcome 2 (cumulative_ratio b (pi q)) (position_logit 0 (pi q)) reward)
    (full := fun q => with_outcome 2 (sequence_ratio b (pi q)) (position_logit 0 (pi q)) reward) :
  [/\ Var b 2 [::] (prefix (1 // 4)) = 3%:R / 64%:R (* rho_1 at q = 1/4 *) /\
      Var b 2 [::] (full (1 // 4)) = 3%:R / 256%:R (* rho_2 at q = 1/4 *),
      Var b 2 [::] (prefix (1 // 2)) = 3%:R / 64%:R (* rho_1 at q = 1/2 *) /\
      Var b 2 [::] (full (1 // 2)) = 3%:R / 64%:R (* rho_2 at q = 1/2 *) &
      Var b 2 [::] (prefix (3 // 4)) = 3%:R / 64%:R (* rho_1 at q = 3/4 *) /\
      Var b 2 [::] (full (3 // 4)) = 27%:R / 256%:R (* rho_2 at q = 3/4 *)].
Proof. solve_all. Qed.

(* The bias of the cumulative ratio is half of that of the token ratio, here exactly. *)
Theorem claim_4_first_order_half (b := coins (1 // 2)) (pi := coins (3 // 4)) (reward := both)
    (g := shared_logit pi) :
  E b 2 [::] (with_outcome 2 (cumulative_ratio b pi) g reward) - gradient pi g 2 reward = - 3%:R / 64%:R
    (* bias of rho_t *) /\
  E b 2 [::] (with_outcome 2 (token_ratio b pi) g reward) - gradient pi g 2 reward = - 3%:R / 32%:R (* bias of r_t *).
Proof. solve_all. Qed.

(* The bias of each logit, and the policy that has moved at the first, the second or both of the tokens. *)
Theorem claim_4_first_order_logits (b := coins (1 // 2)) (first := two_tokens (51 // 100) (1 // 2) (1 // 2))
    (second := two_tokens (1 // 2) (51 // 100) (51 // 100)) (all := coins (51 // 100))
    (bias := fun (weight : binary_policy -> binary_policy -> nat -> seq bool -> rat) pi t =>
       E b 2 [::] (with_outcome 2 (weight b pi) (position_logit t pi) both)
         - gradient pi (position_logit t pi) 2 both) :
  [/\ bias cumulative_ratio first 0%N = 0%:R (* step on first, bias of rho_t on the first logit *),
      bias cumulative_ratio first 1%N = 0%:R (* step on first, bias of rho_t on the second logit *),
      bias token_ratio first 0%N = 0%:R (* step on first, bias of r_t on the first logit *) &
      bias token_ratio first 1%N = - 1%:R / 400%:R (* step on first, bias of r_t on the second logit *)] /\
  [/\ bias cumulative_ratio second 0%N = - 1%:R / 400%:R (* step on second, bias of rho_t on the first logit *),
      bias cumulative_ratio second 1%N = 0%:R (* step on second, bias of rho_t on the second logit *),
      bias token_ratio second 0%N = - 1%:R / 400%:R (* step on second, bias of r_t on the first logit *) &
      bias token_ratio second 1%N = 0%:R (* step on second, bias of r_t on the second logit *)] /\
  [/\ bias cumulative_ratio all 0%N = - 2499%:R / 1000000%:R (* step on both, bias of rho_t on the first logit *),
      bias cumulative_ratio all 1%N = 0%:R (* step on both, bias of rho_t on the second logit *),
      bias token_ratio all 0%N = - 2499%:R / 1000000%:R (* step on both, bias of r_t on the first logit *) &
      bias token_ratio all 1%N = - 2499%:R / 1000000%:R (* step on both, bias of r_t on the second logit *)].
Proof. solve_all. Qed.

(* A critic of b is enough if its advantage goes to all scores so far. *)
Theorem claim_4_performance_difference_example (b := coins (1 // 2)) (pi := coins (3 // 4))
    (reward := both) (g := shared_logit pi) (A := advantage 2 reward b) :
  [/\ gradient pi g 2 reward = 9%:R / 32%:R (* true gradient *),
      E b 2 [::] (undetached_sum 2 (cumulative_ratio b pi) (step A) g) = 9%:R / 32%:R (* all scores so far *) &
      E b 2 [::] (weighted_sum 2 (cumulative_ratio b pi) (fun s a => A s a * g s a)) = 15%:R / 64%:R (* own score *)].
Proof. solve_all. Qed.

(* n* of claim_4_crossover: the sequences above which the sequence ratio has the smaller mean squared error. *)
Theorem claim_4_crossover_example (b := coins (1 // 2)) (g := position_logit 0)
    (cumulative := fun pi => with_outcome 2 (cumulative_ratio b pi) (g pi) both)
    (sequence := fun pi => with_outcome 2 (sequence_ratio b pi) (g pi) both)
    (n_star := fun q (pi := coins q) => (Var b 2 [::] (sequence pi) - Var b 2 [::] (cumulative pi)) /
       (E b 2 [::] (cumulative pi) - gradient pi (g pi) 2 both) ^+ 2) :
  [/\ n_star (51 // 100) = 303%:R (* q = 51/100 *), n_star (11 // 20) = 63%:R (* q = 11/20 *) &
      n_star (3 // 5) = 33%:R (* q = 3/5 *)] /\
  [/\ n_star (3 // 4) = 15%:R (* q = 3/4 *), n_star (9 // 10) = 21%:R / 2%:R (* q = 9/10 *) &
      n_star (2 // 5) = - 27%:R (* q = 2/5 *)].
Proof. solve_all. Qed.

(* --- the doubly robust estimator --------------------------------------------------------------------------------- *)

(* D_t of claim_4_doubly_robust for strings of one and of two tokens. *)
Section DoublyRobust.

Variables (b pi : binary_policy) (Qh : seq bool -> bool -> rat) (reward : seq bool -> rat) (w : seq bool).
Let V s := next pi s (Qh s).

Lemma doubly_robust_only :
  doubly_robust_term b pi 1 Qh reward 0 w = rho b pi w * reward w - rho b pi (take 1 w) * V [::].
Proof. by rewrite /doubly_robust_term big_pred0 ?addr0 ?take0 // => k; rewrite ord1. Qed.

Lemma doubly_robust_first : doubly_robust_term b pi 2 Qh reward 0 w = rho b pi w * reward w
  + (rho b pi (take 1 w) * V (take 1 w) - rho b pi (take 2 w) * step Qh 1 w) - rho b pi (take 1 w) * V [::].
Proof. by rewrite /doubly_robust_term big_mkcond big_ord_recl big_ord1 /= add0r take0. Qed.

Lemma doubly_robust_second :
  doubly_robust_term b pi 2 Qh reward 1 w = rho b pi w * reward w - rho b pi (take 2 w) * V (take 1 w).
Proof. by rewrite /doubly_robust_term big_mkcond big_ord_recl big_ord1 /= !addr0. Qed.

Lemma next_binary s (f : bool -> rat) : next pi s f = pi s true * f true + pi s false * f false.
Proof. exact: big_bool. Qed.

End DoublyRobust.

Ltac rewrite_own ::= rewrite ?doubly_robust_only ?doubly_robust_first ?doubly_robust_second ?next_binary.

(* The exact critic has not the smallest variance: that of b and half of the exact one have less here. Three times the
   exact one has more than none at all. *)
Theorem claim_4_doubly_robust_critics (b := coins (1 // 2)) (pi := coins (3 // 4)) (g := fun t => position_logit t pi)
    (Q := action_value 2 both)
    (total := fun estimate : nat -> seq bool -> rat => Var b 2 [::] (estimate 0%N) + Var b 2 [::] (estimate 1%N))
    (robust := fun Qh t w => step (g t) t w * doubly_robust_term b pi 2 Qh both t w)
    (cumulative := fun t => with_outcome 2 (cumulative_ratio b pi) (g t) both) :
  [/\ total (robust (fun _ _ => 0)) = 243%:R / 2048%:R (* 0 *),
      total (robust (Q b)) = 243%:R / 8192%:R (* Q^b *) &
      total (robust (Q pi)) = 567%:R / 16384%:R (* Q^pi *)] /\
  [/\ total (robust (fun s a => Q pi s a / 2%:R)) = 2187%:R / 65536%:R (* Q^pi / 2 *),
      total (robust (fun s a => 3%:R * Q pi s a)) = 14823%:R / 16384%:R (* 3 Q^pi *) &
      total cumulative = 351%:R / 4096%:R (* rho_t with R, biased *)].
Proof. solve_all. Qed.

(* One token, and as the critic the mean reward of each token in a batch of two, 0 where it is not there: on the batch
   itself that is not independent of what it corrects, on another one it is. *)
Theorem claim_4_doubly_robust_own_batch (b := coins (1 // 2)) (pi := coins (3 // 4)) (g := shared_logit pi)
    (reward := token 0)
    (mean_reward := fun u v s a =>
       if same_string (rcons s a) u then reward u else if same_string (rcons s a) v then reward v else 0)
    (estimate := fun Qh w => step g 0 w * doubly_robust_term b pi 1 Qh reward 0 w) :
  [/\ gradient pi g 1 reward = 3%:R / 16%:R (* true gradient *),
      pair_mean b 1 (fun u v => (estimate (mean_reward u v) u + estimate (mean_reward u v) v) / 2%:R) = 15%:R / 128%:R
        (* on its own batch *) &
      pair_mean b 1 (fun u v => E b 1 [::] (estimate (mean_reward u v))) = 3%:R / 16%:R (* on another batch *)].
Proof. solve_all. Qed.
