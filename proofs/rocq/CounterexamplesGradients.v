(* The counterexamples of gradients: outcome rewards, critics, summed gradients, the stop-gradient form,
   the released loss and the correction of the sampler.

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

(* A critic of b is enough if its advantage goes to all scores so far. *)
Theorem claim_4_performance_difference_example (b := coins (1 // 2)) (pi := coins (3 // 4))
    (reward := both) (g := shared_logit pi) (A := advantage 2 reward b) :
  [/\ gradient pi g 2 reward = 9%:R / 32%:R (* true gradient *),
      E b 2 [::] (undetached_sum 2 (cumulative_ratio b pi) (step A) g) = 9%:R / 32%:R (* all scores so far *) &
      E b 2 [::] (weighted_sum 2 (cumulative_ratio b pi) (fun s a => A s a * g s a)) = 15%:R / 64%:R (* own score *)].
Proof. solve_all. Qed.

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
