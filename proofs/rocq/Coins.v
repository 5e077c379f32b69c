(* Policies on two tokens, given by the probability of the one that is true. *)

From mathcomp Require Import all_ssreflect all_algebra.
From ctpo Require Import Trees.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section Coins.

Variable R : realFieldType.
Implicit Types (p : seq bool -> R) (s : seq bool) (a : bool).

(* The probability of the token true after history s is p s. *)
Definition coin p s a : R := if a then p s else 1 - p s.

Lemma coin_ge0 p : (forall s, 0 <= p s <= 1) -> forall s a, 0 <= coin p s a.
Proof. by move=> p01 s [|] /=; have /andP[ge0 le1] := p01 s; rewrite ?subr_ge0. Qed.

Lemma coin_sum1 p s : \sum_(a : bool) coin p s a = 1.
Proof. by rewrite big_bool /= addrC subrK. Qed.

Definition coins p (p01 : forall s, 0 <= p s <= 1) := Policy (coin_ge0 p01) (coin_sum1 p).

Lemma fraction01 m n : (m <= n)%N -> 0 <= (m%:R / n%:R : R) <= 1.
Proof.
case: n => [|n] le_mn; first by rewrite invr0 mulr0 lexx ler01.
by rewrite divr_ge0 ?ler0n //= ler_pdivr_mulr ?ltr0n // mul1r ler_nat.
Qed.

Definition half01 : 0 <= (1%:R / 2%:R : R) <= 1 := @fraction01 1 2 isT.

(* The first token, true with probability first, decides whether the string is hot (each token after it true with
   probability rate) or cold (with probability 1/2). *)
Definition hot_or_cold (first rate : R) s : R := if s is a :: _ then if a then rate else 1%:R / 2%:R else first.

Lemma hot_or_cold01 first rate : 0 <= first <= 1 -> 0 <= rate <= 1 -> forall s, 0 <= hot_or_cold first rate s <= 1.
Proof. by move=> first01 rate01 [|[] s] //; apply: half01. Qed.

End Coins.
