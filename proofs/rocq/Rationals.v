(* Small worlds over the rationals, and how their numbers are computed.

   The worlds of the files of counterexamples: two tokens (1 is true, 0 is false) or three, policies with small rational
   probabilities, estimators, and tactics that compute an expectation. A computation unfolds the tree into an expression
   of numbers, reads that as a numeral, and lets the machine compute its value as a fraction of binary numbers. *)

From Coq Require Import QArith Lia.
From mathcomp Require Import all_ssreflect all_algebra ssrZ ring.
From ctpo Require Import Trees Gradients.
From ctpo Require Coins.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Close Scope Q_scope.
Local Open Scope ring_scope.

(* --- computing with fractions ------------------------------------------------------------------------------------- *)

(* Coq's fractions of binary numbers, with which the machine computes fast, as rational numbers. *)
Definition rational (q : Q) : rat := (int_of_Z (Qnum q))%:~R / (int_of_Z (Z.pos (Qden q)))%:~R.

(* What is written with numbers, + - * / and powers, and the fraction that it is. Large numbers are decimal digits. *)
Inductive numeral :=
  | Zero
  | One
  | Count of nat
  | Integer of int
  | Digits of Decimal.uint
  | Fraction of Q
  | Plus of numeral & numeral
  | Minus of numeral
  | Times of numeral & numeral
  | Inverse of numeral
  | Power of numeral & nat.

Fixpoint meaning e : rat :=
  match e with
  | Zero => 0
  | One => 1
  | Count n => n%:R
  | Integer z => z%:~R
  | Digits u => (Nat.of_num_uint (Number.UIntDecimal u))%:R
  | Fraction q => rational q
  | Plus e f => meaning e + meaning f
  | Minus e => - meaning e
  | Times e f => meaning e * meaning f
  | Inverse e => (meaning e)^-1
  | Power e n => meaning e ^+ n
  end.

Fixpoint digits (u : Decimal.uint) (z : Z) : Z :=
  match u with
  | Decimal.Nil => z
  | Decimal.D0 u => digits u (Z.add (Z.mul 10 z) 0)
  | Decimal.D1 u => digits u (Z.add (Z.mul 10 z) 1)
  | Decimal.D2 u => digits u (Z.add (Z.mul 10 z) 2)
  | Decimal.D3 u => digits u (Z.add (Z.mul 10 z) 3)
  | Decimal.D4 u => digits u (Z.add (Z.mul 10 z) 4)
  | Decimal.D5 u => digits u (Z.add (Z.mul 10 z) 5)
  | Decimal.D6 u => digits u (Z.add (Z.mul 10 z) 6)
  | Decimal.D7 u => digits u (Z.add (Z.mul 10 z) 7)
  | Decimal.D8 u => digits u (Z.add (Z.mul 10 z) 8)
  | Decimal.D9 u => digits u (Z.add (Z.mul 10 z) 9)
  end.

Fixpoint fraction e : Q :=
  match e with
  | Zero => inject_Z 0
  | One => inject_Z 1
  | Count n => inject_Z (Z.of_nat n)
  | Integer z => inject_Z (Z_of_int z)
  | Digits u => inject_Z (digits u 0)
  | Fraction q => q
  | Plus e f => Qred (Qplus (fraction e) (fraction f))
  | Minus e => Qopp (fraction e)
  | Times e f => Qred (Qmult (fraction e) (fraction f))
  | Inverse e => Qinv (fraction e)
  | Power e n => Qred (iter n (Qmult (fraction e)) (inject_Z 1))
  end.

Lemma int_of_ZD : {morph int_of_Z : m n / Z.add m n >-> m + n}.
Proof. exact: (rmorphD [rmorphism of int_of_Z]). Qed.

Lemma int_of_ZM : {morph int_of_Z : m n / Z.mul m n >-> m * n}.
Proof. exact: (rmorphM [rmorphism of int_of_Z]). Qed.

Lemma int_of_ZN : {morph int_of_Z : n / Z.opp n >-> - n}.
Proof. exact: (rmorphN [rmorphism of int_of_Z]). Qed.

Lemma denominator_gt0 d : 0 < (int_of_Z (Z.pos d))%:~R :> rat.
Proof. by rewrite ltr0z /=; case: (Pos2Nat.is_succ d) => n ->. Qed.

Lemma denominator_neq0 d : (int_of_Z (Z.pos d))%:~R != 0 :> rat.
Proof. exact/lt0r_neq0/denominator_gt0. Qed.

Lemma rational_eq p q : Qeq p q -> rational p = rational q.
Proof. by move=> pq; apply/eqP; rewrite eqr_div ?denominator_neq0 // -!intrM -!int_of_ZM (pq : Z.mul _ _ = _). Qed.

Lemma rational_red q : rational (Qred q) = rational q.
Proof. exact/rational_eq/Qred_correct. Qed.

Lemma rationalZ n : rational (inject_Z n) = (int_of_Z n)%:~R.
Proof. by rewrite /rational divr1. Qed.

Lemma rationalD : {morph rational : p q / Qplus p q >-> p + q}.
Proof. by move=> p q; rewrite /rational addf_div ?denominator_neq0 // -!intrM -!int_of_ZM -intrD -int_of_ZD. Qed.

Lemma rationalM : {morph rational : p q / Qmult p q >-> p * q}.
Proof. by move=> p q; rewrite /rational mulf_div -!intrM -!int_of_ZM. Qed.

Lemma rationalN : {morph rational : q / Qopp q >-> - q}.
Proof. by move=> q; rewrite /rational int_of_ZN mulrNz mulNr. Qed.

Lemma rationalV : {morph rational : q / Qinv q >-> q^-1}.
Proof.
case=> [[|n|n] d]; rewrite /rational invf_div //; first by rewrite mul0r invr0 mulr0.
rewrite [Qnum _]/= [Qden _]/= -[Z.neg n]/(Z.opp (Z.pos n)) -[Z.neg d]/(Z.opp (Z.pos d)).
by rewrite !int_of_ZN !mulrNz invrN mulrN mulNr.
Qed.

Lemma rational_gt0 q : (0 < rational q) = Z.ltb 0 (Qnum q).
Proof.
rewrite /rational pmulr_lgt0 ?invr_gt0 ?denominator_gt0 // ltr0z.
by case: (Qnum q) => //= p; case: (Pos2Nat.is_succ p) => n ->.
Qed.

Lemma digits_nat u n : digits u (Z.of_nat n) = Z.of_nat (Nat.of_uint_acc u n).
Proof.
elim: u n => // u IHu n; cbn [digits Nat.of_uint_acc].
all: by rewrite -IHu Nat.tail_mul_spec; congr digits; lia.
Qed.

Lemma meaning_fraction e : meaning e = rational (fraction e).
Proof.
have nat_int n : n%:R = (int_of_Z (Z.of_nat n))%:~R :> rat by rewrite -[Z.of_nat n]/(Z_of_int n) Z_of_intK.
elim: e => [||n|z|u|q|e IHe f IHf|e IHe|e IHe f IHf|e IHe|e IHe n] //; rewrite [LHS]/= ?IHe ?IHf [fraction _]/=.
- by rewrite rationalZ nat_int.
- by rewrite rationalZ Z_of_intK.
- by rewrite rationalZ (digits_nat u 0) nat_int.
- by rewrite rational_red rationalD.
- by rewrite rationalN.
- by rewrite rational_red rationalM.
- by rewrite rationalV.
by rewrite rational_red; elim: n => [|n IHn]; rewrite ?expr0 // exprS IHn -rationalM.
Qed.

Lemma same_number e f : Qeq_bool (fraction e) (fraction f) -> meaning e = meaning f.
Proof. by move/Qeq_bool_eq/rational_eq; rewrite !meaning_fraction. Qed.

Lemma number e q : fraction e = q -> meaning e = rational q.
Proof. by move<-; apply: meaning_fraction. Qed.

Lemma less e f answer : Z.ltb 0 (Qnum (Qminus (fraction f) (fraction e))) = answer -> (meaning e < meaning f) = answer.
Proof. by move<-; rewrite -subr_gt0 !meaning_fraction -rationalN -rationalD rational_gt0. Qed.

(* --- policies on two tokens --------------------------------------------------------------------------------------- *)

Notation binary_policy := (policy rat_realFieldType bool_finType).
Implicit Types (s w : seq bool) (a : bool) (p b pi : binary_policy).

(* A probability n / d, and n // d when n <= d is seen by computing. *)
Record chance := Chance { part : nat; whole : nat; part_whole : (part <= whole)%N }.
Notation "n // d" := (@Chance n d isT) (at level 40).

Definition probability (c : chance) : rat := (part c)%:R / (whole c)%:R.

Lemma probability01 c : 0 <= probability c <= 1.
Proof. exact/Coins.fraction01/part_whole. Qed.

(* Writes token 1 with probability one s after history s. *)
Definition binary (one : seq bool -> chance) : binary_policy := Coins.coins (fun s => probability01 (one s)).

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

(* The score in the logit of token x of the softmax after prefix k. *)
Definition prefix_logit k x p := softmax_score p id k x.

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

(* Mean and variance over two independent strings. *)
Definition pair_mean p n (X : seq bool -> seq bool -> rat) : rat := E p n [::] (fun u => E p n [::] (X u)).
Definition pair_Var p n (X : seq bool -> seq bool -> rat) : rat :=
  pair_mean p n (fun u v => X u v ^+ 2) - pair_mean p n X ^+ 2.

(* The mean over groups of two of the estimate (1/2) sum_i (R_i - baseline(R_i, R_j)) X_i. *)
Definition in_pairs p n (X reward : seq bool -> rat) (baseline : rat -> rat -> rat) : rat :=
  pair_mean p n (fun u v => ((reward u - baseline (reward u) (reward v)) * X u +
                             (reward v - baseline (reward v) (reward u)) * X v) / 2%:R).

(* The number of tokens up to the first 0, which ends a string; what follows it is padding. *)
Fixpoint written w : nat := if w is a :: w' then if a then (written w').+1 else 1%N else 0%N.

(* --- three tokens ------------------------------------------------------------------------------------------------- *)

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

Lemma big_three (F : 'I_3 -> rat) :
  \sum_c F c = F (@Ordinal 3 0 isT) + F (@Ordinal 3 1 isT) + F (@Ordinal 3 2 isT).
Proof. by rewrite !big_ord_recl big_ord0 addr0 addrA; congr (F _ + F _ + F _); apply: val_inj. Qed.

Lemma rho_one_token (A : finType) (b pi : policy rat_realFieldType A) x : rho b pi [:: x] = ratio b pi [::] x.
Proof. by rewrite -[[:: x]]/(rcons [::] x) rho_rcons rho_nil mul1r. Qed.

Lemma gradient_one_token (A : finType) (q : policy rat_realFieldType A) g reward :
  gradient q g 1 reward = \sum_(x : A) q [::] x * g [::] x * reward [:: x].
Proof.
rewrite /gradient /= coef_sum; apply: eq_bigr => a _.
by rewrite /moved mulrDl coefD -scalerAl coefZ coefXM coefMC !coefC /= mul0r add0r.
Qed.

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

Fixpoint same_string s k : bool :=
  match s, k with
  | [::], [::] => true
  | a :: s', x :: k' => if a then x && same_string s' k' else ~~ x && same_string s' k'
  | _, _ => false
  end.

Lemma same_stringE s k : same_string s k = (s == k).
Proof. by elim: s k => [|a s IHs] [|x k] //=; rewrite IHs eqseq_cons; case: a x => [] []. Qed.

Lemma prefix_logit_tree k x p s a :
  prefix_logit k x p s a = (if same_string s k then ((if a then x else ~~ x) : bool)%:R - p s x else 0).
Proof.
by rewrite /prefix_logit /softmax_score same_stringE; case: eqP => _; case: a x => [] []; rewrite ?mul1r ?mul0r.
Qed.

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
  masked both token ratio written step rcons take drop size nth all nat_of_bool eqn subn subn_rec Nat.sub
  same_string andb negb].
(* What a file adds to the definitions that are unfolded. *)
Ltac rewrite_own := idtac.
Ltac rewrite_tree :=
  rewrite ?gradient_tree ?E_tree ?marginal_product_tree ?weighted_sum_tree ?clipped_sum_tree ?undetached_sum_tree
    ?path_sum_tree ?rho_tree ?path_prod_tree ?chi2_tree ?action_value_tree ?advantage_tree ?shared_logit_tree
    ?position_logit_tree ?prefix_logit_tree;
  rewrite_own.
Ltac unfold_estimator := unfold_strings; repeat (progress rewrite_tree; unfold_strings).
Ltac unfold_policies :=
  lazy beta iota zeta delta [
    mean_of rcons prob binary Coins.coins Coins.coin coins two_tokens stop_or_go probability part whole].
(* The numeral that an expression is. *)
Ltac numeral x :=
  lazymatch x with
  | @GRing.add _ ?y ?z => let e := numeral y in let f := numeral z in constr:(Plus e f)
  | @GRing.opp _ ?y => let e := numeral y in constr:(Minus e)
  | @GRing.mul _ ?y ?z => let e := numeral y in let f := numeral z in constr:(Times e f)
  | @GRing.inv _ ?y => let e := numeral y in constr:(Inverse e)
  | @GRing.exp _ ?y ?n => let e := numeral y in constr:(Power e n)
  | @GRing.natmul _ (@GRing.one _) (Nat.of_num_uint (Number.UIntDecimal ?u)) => constr:(Digits u)
  | @GRing.natmul _ (@GRing.one _) ?n => constr:(Count n)
  | @intmul _ (@GRing.one _) ?z => constr:(Integer z)
  | @GRing.zero _ => constr:(Zero)
  | @GRing.one _ => constr:(One)
  | rational ?q => constr:(Fraction q)
  | _ => fail "not a number:" x
  end.
Ltac compute_number := lazymatch goal with
  | |- ?x = ?y => let e := numeral x in let f := numeral y in let H := fresh in
    assert (H : meaning e = meaning f) by (apply same_number; vm_compute; exact isT);
    cbv beta iota delta [meaning] in H; exact H
  end.
Ltac find_number := lazymatch goal with
  | |- ?x = _ => let e := numeral x in let q := eval vm_compute in (fraction e) in let H := fresh in
    assert (H : meaning e = rational q) by (apply number; vm_compute; reflexivity);
    cbv beta iota delta [meaning] in H; exact H
  end.
(* Replaces the left side of H, just where it is written. *)
Ltac put H := lazymatch type of H with ?x = ?y =>
    pattern x; lazymatch goal with |- ?P x => refine (@eq_ind_r _ y P _ x H) end; cbv beta
  end.
(* Whether a token is clipped, or a weight capped, is a comparison of numbers, which is computed. *)
Ltac decide_comparisons :=
  lazy beta iota delta [clipped above Order.min Order.max fst snd andb];
  repeat match goal with |- context [@Order.lt ?d ?T ?x ?y] =>
    let e := numeral x in let f := numeral y in
    let answer := eval vm_compute in (Z.ltb 0 (Qnum (Qminus (fraction f) (fraction e)))) in
    let H := fresh in let L := fresh in
    assert (H : @Order.lt d T x y = answer);
    [ assert (L : (meaning e < meaning f) = answer) by (apply less; vm_compute; reflexivity);
      cbv beta iota delta [meaning] in L; exact L
    | put H; clear H; lazy beta iota delta [andb] ]
  end.
Ltac forks n := lazymatch n with 0%N => uconstr:(Value _) | S ?m => let v := forks m in uconstr:(Fork v v) end.
Ltac one_by_one :=
  cbv beta iota delta [takes rcons]; repeat match goal with |- _ /\ _ => split end;
  unfold_estimator; unfold_policies; decide_comparisons; find_number.
(* Computes an expectation or a variance that stands in the goal, which there becomes a number. *)
Ltac evaluate mean n values :=
  let x := fresh in let H := fresh in let v := forks n in
  evar (x : rat); assert (H : mean = x);
  [ subst x; refine (eq_trans (values _ n _ _ v _) _); [one_by_one | unfold_policies; find_number]
  | subst x; put H; clear H ].
Ltac evaluate_means := repeat match goal with
  | |- context [@Var ?R ?A ?p ?n ?s ?X] => evaluate (@Var R A p n s X) n Var_values
  | |- context [@E ?R ?A ?p ?n ?s ?X] => evaluate (@E R A p n s X) n E_values
  end.
Ltac unfold_tree :=
  repeat match goal with x := _ |- _ => subst x end; lazy beta delta [in_pairs pair_mean];
  evaluate_means; unfold_estimator; unfold_policies.
Ltac solve_tree := unfold_tree; decide_comparisons; compute_number.
Ltac split_all := lazymatch goal with |- _ = _ => idtac | |- _ => split; split_all end.
Ltac solve_all := split_all; solve_tree.

(* No number is computed while two terms are compared. *)
Strategy 1000 [GRing.add GRing.opp GRing.mul GRing.inv GRing.natmul GRing.exp GRing.zero GRing.one rational].
