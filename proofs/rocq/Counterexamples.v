(* The counterexamples, over the rationals.

   Every theorem here gives the numbers of one small world: a few tokens of two kinds (1 is true, 0 is false), policies
   with small rational probabilities, and the definitions of Trees.v and Gradients.v. The comment after each number is
   its name in proofs/counterexamples.json. Each proof is one computation: it unfolds the tree and adds fractions. *)

From mathcomp Require Import all_ssreflect all_algebra ring.
From ctpo Require Import Trees Gradients.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(* --- policies on two tokens --------------------------------------------------------------------------------------- *)

Local Notation binary_policy := (policy rat_realFieldType bool_finType).
Implicit Types (s w : seq bool) (a : bool) (p b pi : binary_policy).

(* A probability n / d, and n // d when n <= d is seen by computing. *)
Record chance := Chance { part : nat; whole : nat; part_whole : (part <= whole)%N }.
Notation "n // d" := (@Chance n d isT) (at level 40).

Definition probability (c : chance) : rat := (part c)%:R / (whole c)%:R.

Lemma probability01 c : 0 <= probability c <= 1.
Proof.
case: c => n d le_nd; rewrite /probability divr_ge0 ?ler0n //=.
case: d le_nd => [|d] le_nd; first by rewrite invr0 mulr0.
by rewrite ler_pdivr_mulr ?ltr0n // mul1r ler_nat.
Qed.

(* Writes token 1 with probability one s after history s. *)
Section Binary.

Variable one : seq bool -> chance.

Definition binary_prob s a : rat := if a then probability (one s) else 1 - probability (one s).

Lemma binary_prob_ge0 s a : 0 <= binary_prob s a.
Proof. by case: a => /=; case/andP: (probability01 (one s)) => // _; rewrite subr_ge0. Qed.

Lemma binary_prob_sum1 s : \sum_(a : bool) binary_prob s a = 1.
Proof. by rewrite big_bool /= addrC subrK. Qed.

Definition binary : binary_policy := Policy binary_prob_ge0 binary_prob_sum1.

End Binary.

(* Independent tokens, and two tokens: the probabilities of token 1 first, after 0 and after 1. *)
Definition coins q : binary_policy := binary (fun=> q).
Definition two_tokens q q0 q1 : binary_policy := binary (fun s => if s is a :: _ then if a then q1 else q0 else q).

(* Token 0 ends the string: the probabilities to go on after no token and after one. All else is 1/2; what comes after a
   0 is padding, which all these policies write alike. *)
Definition stop_or_go q q1 : binary_policy :=
  binary (fun s => match s with [::] => q | [:: true] => q1 | _ => 1 // 2 end).

(* --- logits and estimators ---------------------------------------------------------------------------------------- *)

(* The score in the logit of token 1: of one logit that all positions share, or of the logit of position t + 1. *)
Definition shared_logit p := softmax_score p (fun=> tt) tt true.
Definition position_logit (t : nat) p := softmax_score p size t true.

Section Weights.

Variables b pi : binary_policy.

(* The weights of token t + 1: the cumulative ratio, the token ratio and the ratio of the whole string. *)
Definition cumulative_ratio (t : nat) w : rat := rho b pi (take t.+1 w).
Definition token_ratio (t : nat) w : rat := step (ratio b pi) t w.
Definition sequence_ratio (t : nat) w : rat := rho b pi w.

End Weights.

(* Token k + 1 of a string as a number, a_{k+1}. *)
Definition token k w : rat := (nth false w k)%:R.

(* R = a1 a2. *)
Definition both w : rat := token 0 w * token 1 w.

(* sum_t weight_t f_t, and with the outcome reward sum_t weight_t g_t R. *)
Definition weighted_sum H (weight : nat -> seq bool -> rat) (f : seq bool -> bool -> rat) w : rat :=
  \sum_(t < H) weight t w * step f t w.
Definition with_outcome H weight g (reward : seq bool -> rat) w : rat := weighted_sum H weight g w * reward w.

(* sum_t weight_t A_t g_t without the tokens that a window (low, high) clips: those of A_t > 0 with a weight above high,
   and those of A_t < 0 with a weight below low. *)
Definition clipped (window : rat * rat) (weight A : rat) : bool :=
  if 0 < A then window.2 < weight else (A < 0) && (weight < window.1).
Definition clipped_sum H window (weight : nat -> seq bool -> rat) (A g : seq bool -> bool -> rat) w : rat :=
  \sum_(t < H) (if clipped window (weight t w) (step A t w) then 0 else weight t w * step A t w * step g t w).

(* sum_t weight_t A_t sum_{k <= t} g_k: what differentiating sum_t rho_t A_t gives if no factor is held constant. *)
Definition undetached_sum H (weight A : nat -> seq bool -> rat) (g : seq bool -> bool -> rat) w : rat :=
  \sum_(t < H) weight t w * A t w * path_sum g (take t.+1 w).

(* Both forms with the cumulative ratio, two tokens and one shared logit. *)
Definition stop_gradient b pi (A : seq bool -> bool -> rat) : seq bool -> rat :=
  weighted_sum 2 (cumulative_ratio b pi) (fun s a => A s a * shared_logit pi s a).
Definition undetached b pi (A : seq bool -> bool -> rat) : seq bool -> rat :=
  undetached_sum 2 (cumulative_ratio b pi) (step A) (shared_logit pi).

(* For two tokens rho_1^(1/1) and rho_2^(1/2), if the squares of the numbers root are the token ratios. *)
Definition mean_root b pi (root : seq bool -> bool -> rat) (t : nat) w : rat :=
  if t is 0 then rho b pi (take 1 w) else path_prod root (take 2 w).

(* prod_{k <= t} (1 + E_b chi2(s_k)) - 1, the product formula with the marginal chi2. *)
Definition marginal_product b pi t : rat := \prod_(k < t) (1 + E b k [::] (chi2 b pi)) - 1.

(* Mean and variance given an event. *)
Definition mean_given p n (event : seq bool -> bool) (X : seq bool -> rat) : rat :=
  E p n [::] (fun w => (event w)%:R * X w) / E p n [::] (fun w => (event w)%:R).
Definition Var_given p n event X : rat := mean_given p n event (fun w => X w ^+ 2) - mean_given p n event X ^+ 2.

(* The effective sample size of two weights. *)
Definition pair_ess (x y : rat) : rat := (x + y) ^+ 2 / (x ^+ 2 + y ^+ 2).

(* A weight with an upper bound. *)
Definition above (cap weight : rat) : bool := cap < weight.
Definition truncated cap weight : rat := if above cap weight then cap else weight.
Definition masked cap weight : rat := if above cap weight then 0 else weight.

(* The mean over two independent strings. *)
Definition pair_mean p n (X : seq bool -> seq bool -> rat) : rat := E p n [::] (fun u => E p n [::] (X u)).

(* The number of tokens up to the first 0, which ends a string; what follows it is padding. *)
Fixpoint written w : nat := if w is a :: w' then if a then (written w').+1 else 1%N else 0%N.

(* --- how the numbers are computed --------------------------------------------------------------------------------- *)

(* The definitions as plain recursions, which unfold on given strings. *)
Fixpoint tree_E p n s (X : seq bool -> rat) : rat :=
  if n is n'.+1 then p s true * tree_E p n' (rcons s true) X + p s false * tree_E p n' (rcons s false) X else X s.

Fixpoint tree_prod (f : seq bool -> bool -> rat) s w : rat :=
  if w is a :: w' then f s a * tree_prod f (rcons s a) w' else 1.

Fixpoint first_sum (f : nat -> rat) n : rat := if n is n'.+1 then first_sum f n' + f n' else 0.

Fixpoint first_product (f : nat -> rat) n : rat := if n is n'.+1 then first_product f n' * f n' else 1.

Definition tree_value H (reward : seq bool -> rat) p s : rat := tree_E p (H - size s) s reward.

Lemma E_tree p n s X : E p n s X = tree_E p n s X.
Proof. by elim: n s => //= n IHn s; rewrite big_bool !IHn. Qed.

Lemma path_prod_tree f w : path_prod f w = tree_prod f [::] w.
Proof.
suff IH s u : path_prod f (s ++ u) = path_prod f s * tree_prod f s u by rewrite -[w]cat0s IH path_prod_nil mul1r.
elim: u s => [|a u IHu] s /=; first by rewrite cats0 mulr1.
by rewrite -cat_rcons IHu path_prod_rcons mulrA.
Qed.

Lemma sum_first n (f : nat -> rat) : \sum_(t < n) f t = first_sum f n.
Proof. by elim: n => [|n IHn]; rewrite ?big_ord0 // big_ord_recr /= IHn. Qed.

Lemma marginal_product_tree b pi t :
  marginal_product b pi t = first_product (fun k => 1 + E b k [::] (chi2 b pi)) t - 1.
Proof. by congr (_ - 1); elim: t => [|t IHt]; rewrite ?big_ord0 // big_ord_recr /= IHt. Qed.

Lemma path_sum_tree f w : path_sum f w = first_sum (fun t => step f t w) (size w).
Proof. exact: sum_first. Qed.

Lemma weighted_sum_tree H weight f w : weighted_sum H weight f w = first_sum (fun t => weight t w * step f t w) H.
Proof. exact: sum_first. Qed.

Lemma clipped_sum_tree H window weight A g w : clipped_sum H window weight A g w =
  first_sum (fun t => if clipped window (weight t w) (step A t w) then 0 else weight t w * step A t w * step g t w) H.
Proof. exact: sum_first. Qed.

Lemma undetached_sum_tree H weight A g w : undetached_sum H weight A g w =
  first_sum (fun t => weight t w * A t w * first_sum (fun k => step g k (take t.+1 w)) (size (take t.+1 w))) H.
Proof. by rewrite -sum_first; apply: eq_bigr => t _; rewrite path_sum_tree. Qed.

Lemma action_value_tree H reward p s a : action_value H reward p s a = tree_value H reward p (rcons s a).
Proof. by rewrite /action_value /value !E_tree. Qed.

Lemma advantage_tree H reward p s a :
  advantage H reward p s a = tree_value H reward p (rcons s a) - tree_value H reward p s.
Proof. by rewrite /advantage /action_value /value !E_tree. Qed.

Lemma rho_tree b pi w : rho b pi w = tree_prod (fun s a => pi s a / b s a) [::] w.
Proof. exact: path_prod_tree. Qed.

Lemma chi2_tree b pi s : chi2 b pi s = pi s true ^+ 2 / b s true + pi s false ^+ 2 / b s false - 1.
Proof. by rewrite /chi2 big_bool. Qed.

Lemma shared_logit_tree p s a : shared_logit p s a = a%:R - p s true.
Proof. by rewrite /shared_logit /softmax_score eqxx mul1r eqb_id. Qed.

Lemma position_logit_tree t p s a : position_logit t p s a = (if eqn (size s) t then a%:R - p s true else 0).
Proof. by rewrite /position_logit /softmax_score eqb_id -eqnE; case: eqn; rewrite ?mul1r ?mul0r. Qed.

(* The gradient by the product rule: the score of each token times what is expected after it. *)
Section Slope.

Variables (p : binary_policy) (g : seq bool -> bool -> rat) (reward : seq bool -> rat).

Fixpoint tree_slope n s : rat :=
  if n is n'.+1 then
    p s true * (g s true * tree_E p n' (rcons s true) reward + tree_slope n' (rcons s true)) +
    p s false * (g s false * tree_E p n' (rcons s false) reward + tree_slope n' (rcons s false))
  else 0.

Lemma moved_coef n s (J := E (moved p g) n s (fun w => (reward w)%:P)) :
  (J`_0 = tree_E p n s reward) * (J`_1 = tree_slope n s).
Proof.
rewrite {}/J; elim: n s => [|n IHn] s; first by rewrite /= !coefC.
rewrite /= !big_bool /= /moved !coefD !mulrDl !coefD !coefCM -!scalerAl !coefZ !coefXM /= !mulr0 !addr0.
by rewrite !(IHn (rcons _ _)); split=> //; ring.
Qed.

Lemma gradient_tree H : gradient p g H reward = tree_slope H [::].
Proof. exact: (moved_coef H [::]).2. Qed.

End Slope.

(* The values of a variable on the strings of a tree, computed one by one. *)
Inductive values := Value of rat | Fork of values & values.

Fixpoint takes n s (X : seq bool -> rat) v : Prop :=
  match n, v with
  | 0%N, Value x => X s = x
  | n'.+1, Fork v1 v0 => takes n' (rcons s true) X v1 /\ takes n' (rcons s false) X v0
  | _, _ => False
  end.

Fixpoint mean_of p (f : rat -> rat) s v : rat :=
  match v with
  | Value x => f x
  | Fork v1 v0 => p s true * mean_of p f (rcons s true) v1 + p s false * mean_of p f (rcons s false) v0
  end.

Lemma mean_of_values p f n s X v : takes n s X v -> E p n s (fun w => f (X w)) = mean_of p f s v.
Proof.
elim: n s v => [|n IHn] s [x|v1 v0] //=; first by move->.
by case=> /IHn E1 /IHn E0; rewrite big_bool E1 E0.
Qed.

Lemma E_values p n s X v : takes n s X v -> E p n s X = mean_of p id s v.
Proof. exact: mean_of_values. Qed.

Lemma Var_values p n s X v : takes n s X v -> Var p n s X = mean_of p (fun x => x ^+ 2) s v - mean_of p id s v ^+ 2.
Proof. by move=> X_v; rewrite /Var (mean_of_values p (fun x => x ^+ 2) X_v) (E_values p X_v). Qed.

(* Unfolds everything on the strings of a tree, and leaves an equation between numbers. *)
Ltac unfold_strings := lazy beta iota zeta delta [
  Var mean_given Var_given pair_mean pair_ess tree_E tree_prod first_sum first_product tree_value tree_slope
  with_outcome cumulative_ratio token_ratio sequence_ratio mean_root string_prob stop_gradient undetached truncated
  masked both token ratio written step rcons take drop size nth all nat_of_bool eqn subn subn_rec Nat.sub andb negb].
Ltac rewrite_tree :=
  rewrite ?gradient_tree ?E_tree ?marginal_product_tree ?weighted_sum_tree ?clipped_sum_tree ?undetached_sum_tree
    ?path_sum_tree ?rho_tree ?path_prod_tree ?chi2_tree ?action_value_tree ?advantage_tree ?shared_logit_tree
    ?position_logit_tree.
Ltac unfold_estimator := unfold_strings; repeat (progress rewrite_tree; unfold_strings).
Ltac forks n := lazymatch n with 0%N => uconstr:(Value _) | S ?m => let v := forks m in uconstr:(Fork v v) end.
(* Whether a token is clipped, or a weight capped, is a comparison of numbers, which is computed. *)
Ltac decide_comparisons := repeat match goal with
  | |- context [clipped ?window ?weight ?A] =>
    let c := constr:(clipped window weight A) in
    let answer := eval vm_compute in c in replace c with answer by (vm_compute; reflexivity)
  | |- context [above ?cap ?weight] =>
    let c := constr:(above cap weight) in
    let answer := eval vm_compute in c in replace c with answer by (vm_compute; reflexivity)
  end; lazy iota.
Ltac unfold_policies :=
  lazy beta iota zeta delta [mean_of rcons prob binary binary_prob coins two_tokens stop_or_go probability part whole].
(* Where a token has probability 1 - 1 / 1 that goes first, as no number may be divided by 0. *)
Ltac add_fractions := by field.
Ltac add_fractions_without_zeros :=
  rewrite ?(mulr0n, mulr1n, divr1, subr0, subrr, mul0r, invr0, mulr0, addr0, add0r); by field.
(* The fraction that a rational number is. *)
Ltac fraction x :=
  let n := eval vm_compute in (numq x) in
  let d := eval vm_compute in `|denq x|%N in
  lazymatch n with
  | Posz ?m => constr:(m%:R / d%:R : rat)
  | Negz ?m => constr:(- m.+1%:R / d%:R : rat)
  end.
Ltac one_by_one add :=
  cbv beta iota delta [takes rcons]; repeat match goal with |- _ /\ _ => split end;
  unfold_estimator; unfold_policies; decide_comparisons;
  lazymatch goal with |- ?x = _ => let y := fraction x in refine (_ : x = y); add end.
Ltac unfold_tree add :=
  repeat match goal with x := _ |- _ => subst x end; rewrite /pair_mean;
  lazymatch goal with
  | |- Var _ ?n _ _ = _ => let v := forks n in refine (eq_trans (@Var_values _ n _ _ v _) _); [one_by_one add |]
  | |- Var _ ?n _ _ + Var _ _ _ _ = _ => let v := forks n in
    refine (eq_trans (congr2 +%R (@Var_values _ n _ _ v _) (@Var_values _ n _ _ v _)) _);
    [one_by_one add | one_by_one add |]
  | |- E _ ?n _ _ = _ => let v := forks n in refine (eq_trans (@E_values _ n _ _ v _) _); [one_by_one add |]
  | _ => unfold_estimator
  end;
  unfold_policies.
Ltac solve_tree add := unfold_tree add; decide_comparisons; add.
Ltac split_all := lazymatch goal with |- _ = _ => idtac | |- _ => split; split_all end.
Ltac solve_all := split_all; solve_tree add_fractions.
Ltac solve_padded := split_all; solve_tree add_fractions_without_zeros.

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

(* --- groups of two ------------------------------------------------------------------------------------------------ *)

(* One token of three, in the proportions k0 : k1 : k2. *)
Section OneOfThree.

Variables k0 k1 k2 : nat.
Hypothesis some : (0 < k0 + (k1 + k2))%N.

Definition three_prob (h : seq 'I_3) (c : 'I_3) : rat := (nth 0%N [:: k0; k1; k2] c)%:R / (k0 + (k1 + k2))%:R.

Lemma three_prob_ge0 h c : 0 <= three_prob h c.
Proof. by rewrite divr_ge0 ?ler0n. Qed.

Lemma three_prob_sum1 h : \sum_c three_prob h c = 1.
Proof.
rewrite -big_distrl !big_ord_recl big_ord0 /= addr0 -!natrD.
by rewrite divff // pnatr_eq0 -lt0n.
Qed.

Definition one_of_three : policy rat_realFieldType [finType of 'I_3] := Policy three_prob_ge0 three_prob_sum1.

End OneOfThree.

Lemma gradient_one_token (A : finType) (q : policy rat_realFieldType A) g reward :
  gradient q g 1 reward = \sum_(x : A) q [::] x * g [::] x * reward [:: x].
Proof.
rewrite /gradient /= coef_sum; apply: eq_bigr => a _.
by rewrite /moved mulrDl coefD -scalerAl coefZ coefXM coefMC !coefC /= mul0r add0r.
Qed.

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

(* --- support and survivors ---------------------------------------------------------------------------------------- *)

(* Absolute continuity fails: b writes token 1 only, pi both with 1/2. *)
Theorem claim_1_support_example (b := coins (1 // 1)) (pi := coins (1 // 2)) :
  [/\ E b 1 [::] (rho b pi) = 1%:R / 2%:R (* E rho_1 *),
      E b 2 [::] (rho b pi) = 1%:R / 4%:R (* E rho_2 *) &
      E b 3 [::] (rho b pi) = 1%:R / 8%:R (* E rho_3 *)].
Proof. solve_padded. Qed.

(* It fails at the second token only: the variance falls. *)
Theorem claim_1_support_order (b := two_tokens (1 // 2) (1 // 1) (1 // 1))
    (pi := two_tokens (3 // 4) (1 // 2) (1 // 2)) :
  Var b 1 [::] (rho b pi) = 1%:R / 4%:R (* Var rho_1 *) /\
  Var b 2 [::] (rho b pi) = 1%:R / 16%:R (* Var rho_2 *).
Proof. solve_padded. Qed.

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
by case=> [|[] ?] []; rewrite -?exprnN -?exprnP /ratio /= /binary_prob /probability /=; field.
Qed.

(* --- the product formula, where it is right ----------------------------------------------------------------------- *)

(* The second token's ratios depend on the first token, chi2 does not. *)
Theorem claim_2_product_constant_chi2 (b := two_tokens (1 // 2) (1 // 2) (4 // 5))
    (pi := two_tokens (3 // 4) (3 // 4) (3 // 5)) :
  Var b 2 [::] (rho b pi) = 9%:R / 16%:R (* Var rho_2 *) /\
  marginal_product b pi 2 = 9%:R / 16%:R (* product formula *).
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
by case=> [|[] ?] []; split=> //; rewrite /ratio /= /binary_prob /probability /=; field.
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
by move=> s []; split=> //; rewrite /ratio /= /binary_prob /probability /=; field.
Qed.

(* In that world rho_2^(1/2) makes of b the uniform law of the four strings, scaled by Z < 1. *)
Theorem claim_3_gspo_example (b := coins (1 // 5))
    (root := fun (s : seq bool) (a : bool) => if a then 2%:R else 1 / 2%:R : rat)
    (Z := E b 2 [::] (path_prod root)) (q := fun w => string_prob b w * path_prod root w / Z) :
  [/\ Z = 16%:R / 25%:R (* Z *),
      q [:: false; false] = 1%:R / 4%:R (* q(00) *), q [:: false; true] = 1%:R / 4%:R (* q(01) *),
      q [:: true; false] = 1%:R / 4%:R (* q(10) *) & q [:: true; true] = 1%:R / 4%:R (* q(11) *)].
Proof. solve_all. Qed.

(* --- more on outcome rewards -------------------------------------------------------------------------------------- *)

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

(* --- more on summed gradients ------------------------------------------------------------------------------------- *)

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

(* --- more on groups ----------------------------------------------------------------------------------------------- *)

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

(* --- more on lengths ---------------------------------------------------------------------------------------------- *)

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

(* --- more on clipping --------------------------------------------------------------------------------------------- *)

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
