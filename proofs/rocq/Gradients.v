(* Rewards, values, advantages, scores and the policy gradient.

   The reward is any function of the finished string of H tokens; a sum of rewards per token, and an outcome reward, are
   two of them. A parameter enters a policy through its score, the derivative of log pi(a|s): a function of history and
   token whose mean under the policy is 0. All here is about one parameter at a time (a coordinate of the gradient); the
   score of a softmax in its logits is a rational function of the probabilities, so nothing needs an exponential. *)

From mathcomp Require Import all_ssreflect all_algebra.
From ctpo Require Import Trees.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section Values.

Variables (R : realFieldType) (A : finType) (H : nat) (reward : seq A -> R) (p : policy R A).

(* V^p(s): the expected reward when p goes on from s; the reward itself once the string is finished. *)
Definition value s : R := E p (H - size s) s reward.

(* Q^p(s, a) and the advantage A^p(s, a) = Q^p(s, a) - V^p(s). *)
Definition action_value s a : R := value (rcons s a).
Definition advantage s a : R := action_value s a - value s.

(* J(p), the expected reward of a string. *)
Definition objective : R := E p H [::] reward.

End Values.

Section Scores.

Variables (R : realFieldType) (A : finType) (p : policy R A).
Implicit Types g : seq A -> A -> R.

(* The derivative of a log-probability has mean 0 at every history, as probabilities sum to 1. *)
Definition is_score g := forall s, next p s (g s) = 0.

(* The softmax. key s names the logits that history s uses: the history itself (a tree with parameters of its own at each
   prefix), its length (parameters of each position) or a constant (one shared block). This is the derivative of
   log p(a|s) in the logit of token a' of block k; PolicyGradient.v derives it. *)
Definition softmax_score (K : eqType) (key : seq A -> K) (k : K) (a' : A) s a : R :=
  (key s == k)%:R * ((a == a')%:R - p s a').

(* The policy whose log-probabilities have moved by eps in direction g, to first order in eps: a polynomial in eps. *)
Definition moved g s a : {poly R} := (p s a)%:P + (p s a * g s a) *: 'X.

(* The derivative of the objective at eps = 0: the first-order coefficient of a polynomial. *)
Definition gradient g (H : nat) (reward : seq A -> R) : R := (E (moved g) H [::] (fun w => (reward w)%:P))`_1.

End Scores.

(* The trace of a covariance matrix: the variances of the coordinates, added. *)
Definition trace_var (R : realFieldType) (A : finType) (I : finType) (p : policy R A) n s (X : I -> seq A -> R) : R :=
  \sum_(i : I) Var p n s (X i).
