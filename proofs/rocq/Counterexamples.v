(* The counterexamples, over the rationals.

   Every theorem here computes the numbers of one small world: two or three tokens of two kinds (1 is true, 0 is false),
   policies with small rational probabilities. The definitions are those of Trees.v and Gradients.v, which hold for any
   field; the rationals make both sides numbers. The numbers of proofs/counterexamples.json stand beside the theorems'. *)

From mathcomp Require Import all_ssreflect all_algebra ring.
From ctpo Require Import Trees Gradients.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(* --- policies on two tokens ------------------------------------------------------------------------------------------ *)

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

(* Token 0 ends the string: the probabilities to go on after no token and after one. All else is written alike, with 1/2;
   what comes after a 0 is padding. *)
Definition stop_or_go q q1 : binary_policy :=
  binary (fun s => match s with [::] => q | [:: true] => q1 | _ => 1 // 2 end).

(* --- logits and estimators ------------------------------------------------------------------------------------------- *)

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

(* a_{k+1}, token k + 1 of a string as a number. *)
Definition token k w : rat := (nth false w k)%:R.

(* sum_t weight_t f_t, and with the outcome reward sum_t weight_t g_t R. *)
Definition weighted_sum H (weight : nat -> seq bool -> rat) (f : seq bool -> bool -> rat) w : rat :=
  \sum_(t < H) weight t w * step f t w.
Definition with_outcome H weight g (reward : seq bool -> rat) w : rat := weighted_sum H weight g w * reward w.

(* sum_t weight_t A_t g_t without the tokens that a window (low, high) clips: those of A_t > 0 with a weight above high, and
   those of A_t < 0 with a weight below low. *)
Definition clipped (window : rat * rat) (weight A : rat) : bool :=
  if 0 < A then window.2 < weight else (A < 0) && (weight < window.1).
Definition clipped_sum H window (weight : nat -> seq bool -> rat) (A g : seq bool -> bool -> rat) w : rat :=
  \sum_(t < H) (if clipped window (weight t w) (step A t w) then 0 else weight t w * step A t w * step g t w).

(* prod_{k <= t} (1 + E_b chi2(s_k)) - 1, the product formula with the marginal chi2. *)
Definition marginal_product b pi t : rat := \prod_(k < t) (1 + E b k [::] (chi2 b pi)) - 1.

(* Mean and variance given an event. *)
Definition mean_given p n (event : seq bool -> bool) (X : seq bool -> rat) : rat :=
  E p n [::] (fun w => (event w)%:R * X w) / E p n [::] (fun w => (event w)%:R).
Definition Var_given p n event X : rat := mean_given p n event (fun w => X w ^+ 2) - mean_given p n event X ^+ 2.

(* The mean over two independent strings. *)
Definition pair_mean p n (X : seq bool -> seq bool -> rat) : rat := E p n [::] (fun u => E p n [::] (X u)).

(* The number of tokens up to the first 0, which ends a string; what follows it is padding. *)
Fixpoint written w : nat := if w is a :: w' then if a then (written w').+1 else 1%N else 0%N.

(* --- how the numbers are computed ------------------------------------------------------------------------------------ *)

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

(* Unfolds everything on the strings of a tree, and leaves an equation between numbers. *)
Ltac unfold_strings := lazy beta iota zeta delta [
  Var mean_given Var_given pair_mean tree_E tree_prod first_sum first_product tree_value tree_slope
  with_outcome cumulative_ratio token_ratio sequence_ratio 
  token ratio written step rcons take drop size nth all nat_of_bool eqn subn subn_rec Nat.sub andb negb].
Ltac rewrite_tree :=
  rewrite ?gradient_tree ?E_tree ?marginal_product_tree ?weighted_sum_tree ?clipped_sum_tree ?path_sum_tree ?rho_tree ?chi2_tree
    ?advantage_tree ?shared_logit_tree ?position_logit_tree.
Ltac unfold_tree :=
  repeat match goal with x := _ |- _ => subst x end;
  do 3 (unfold_strings; rewrite_tree); unfold_strings;
  lazy beta iota zeta delta [prob binary binary_prob coins two_tokens stop_or_go probability part whole].
(* Tokens that have probability 0 go first, as no number may be divided by 0. *)
Ltac drop_zeros := rewrite ?(mulr0n, mulr1n, divr1, subr0, subrr, mul0r, invr0, mulr0, addr0, add0r).
(* Whether a token is clipped is a comparison of numbers, which is computed. *)
Ltac decide_clipped := repeat match goal with
  |- context [clipped ?window ?weight ?A] =>
    let c := constr:(clipped window weight A) in
    let answer := eval vm_compute in c in
    replace c with answer by (vm_compute; reflexivity)
  end; lazy iota.
Ltac solve_tree := unfold_tree; decide_clipped; by field.
Ltac split_all := lazymatch goal with |- _ = _ => idtac | |- _ => split; split_all end.
Ltac solve_all := split_all; solve_tree.
Ltac solve_padded := split_all; unfold_tree; drop_zeros; by field.

(* --- strictness ------------------------------------------------------------------------------------------------------ *)

(* The policies differ after a first token 0, which b writes and pi never does: pi's variance stops growing. *)
Theorem claim_1s_strict_equality (b := coins (1 // 2)) (pi := two_tokens (1 // 1) (9 // 10) (1 // 2)) :
  [/\ Var b 1 [::] (rho b pi) = 1%:R (* Var rho_1 *),
      Var b 2 [::] (rho b pi) = 1%:R (* Var rho_2 *) &
      Var b 2 [::] (step (ratio b pi) 1) = 8%:R / 25%:R (* Var r_2 *)].
Proof. solve_all. Qed.

(* --- the product formula --------------------------------------------------------------------------------------------- *)

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

(* --- outcome rewards ------------------------------------------------------------------------------------------------- *)

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

(* --- the summed gradient --------------------------------------------------------------------------------------------- *)

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

(* --- lengths --------------------------------------------------------------------------------------------------------- *)

(* Stop (R = 0) or go on (R = 1), and after that stop at the second token or write a third. The factor 1/T brings in how
   b goes on, though the advantage is the exact A^pi: neither grad J nor the on-policy value. *)
Theorem claim_6_length_prop1_example (b := stop_or_go (1 // 2) (3 // 4)) (pi := stop_or_go (1 // 2) (1 // 2))
    (reward := token 0) (f := fun s a => position_logit 0 pi s a * advantage 3 reward pi s a) :
  [/\ gradient pi (position_logit 0 pi) 3 reward = 1%:R / 4%:R (* true gradient *),
      E b 3 [::] (fun w => weighted_sum 3 (cumulative_ratio b pi) f w / (written w)%:R) = 11%:R / 64%:R
        (* rho_t / T under b *) &
      E pi 3 [::] (fun w => path_sum f w / (written w)%:R) = 17%:R / 96%:R (* 1 / T under pi *)].
Proof. solve_all. Qed.

(* --- clipping -------------------------------------------------------------------------------------------------------- *)

(* R = 2 a1 - a2, one shared logit, the exact A^pi and the window [4/5, 6/5]: what clipping leaves of the gradient points
   the other way, under the cumulative and under the token ratio. *)
Theorem claim_6_clip_sign (b := coins (1 // 2)) (pi := coins (3 // 4))
    (reward := fun w => 2%:R * token 0 w - token 1 w) (A := advantage 2 reward pi)
    (window := (4%:R / 5%:R, 6%:R / 5%:R)) :
  [/\ gradient pi (shared_logit pi) 2 reward = 3%:R / 16%:R (* true gradient *),
      E b 2 [::] (clipped_sum 2 window (cumulative_ratio b pi) A (shared_logit pi)) = - 45%:R / 256%:R
        (* clipped rho_t *) &
      E b 2 [::] (clipped_sum 2 window (token_ratio b pi) A (shared_logit pi)) = - 3%:R / 16%:R (* clipped r_t *)].
Proof. solve_all. Qed.

(* --- groups of two --------------------------------------------------------------------------------------------------- *)

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
  pair_gradient [:: c] [:: d] = (if (r c < r d)%N then -1 else (r d < r c)%N%:R) * ((val c == 1%N)%:R - (val d == 1%N)%:R)
    / 2%:R.
Proof.
rewrite /pair_gradient !normalized_sg /path_sum /= !big_ord_recl !big_ord0 /step /= !second_logitE !sg_nat -/(r c) -/(r d).
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
