(* What the chapters use of expectations: which strings count, one token at a time, and the ratio as a weight.

   The weight rho_n makes pi write the first n tokens and leaves the others to b (rho_switches). So it corrects whatever
   is known once these are written (E_rho_known, Prop. 1); a longer ratio does so too, with a larger second moment. *)

From mathcomp Require Import all_ssreflect all_algebra ring.
From ctpo Require Import Trees.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(* --- the strings that a policy can write -------------------------------------------------------------------------- *)

Section Reachable.

Variables (R : realFieldType) (A : finType) (p : policy R A).
Implicit Types (s u w : seq A) (X Y : seq A -> R).

Lemma reachable_cat s u : reachable p (s ++ u) -> reachable p s.
Proof. by elim/last_ind: u => [|u a IHu]; rewrite ?cats0 // -rcons_cat reachable_rcons => /andP[/IHu]. Qed.

Lemma reachable_take t w : reachable p w -> reachable p (take t w).
Proof. by move=> reach; apply: (@reachable_cat _ (drop t w)); rewrite cat_take_drop. Qed.

Lemma unreachable s : ~~ reachable p s -> string_prob p s = 0.
Proof. by rewrite /reachable lt_def string_prob_ge0 andbT negbK => /eqP. Qed.

(* An expectation as the sum over the strings of n tokens. *)
Lemma E_strings n X : E p n [::] X = \sum_(w : n.-tuple A) string_prob p w * X w.
Proof. by rewrite E_big; apply: eq_bigr => w _; rewrite /string_prob /path_prod size_tuple. Qed.

(* Bounds need to hold on the strings that p can write. *)
Lemma E_le_reachable n X Y : (forall u, size u = n -> reachable p u -> X u <= Y u) -> E p n [::] X <= E p n [::] Y.
Proof.
move=> leXY; rewrite !E_strings; apply: ler_sum => u _; have [reach | /unreachable->] := boolP (reachable p u).
  by rewrite ler_wpmul2l ?string_prob_ge0 // leXY ?size_tuple.
by rewrite !mul0r.
Qed.

Lemma E_ge0_reachable n X : (forall u, size u = n -> reachable p u -> 0 <= X u) -> 0 <= E p n [::] X.
Proof. by move=> X_ge0; rewrite -(E0 p n [::]); apply: E_le_reachable. Qed.

Lemma E_eq0_reachable n X : (forall u, size u = n -> reachable p u -> 0 <= X u) -> E p n [::] X = 0 ->
  forall u, size u = n -> reachable p u -> X u = 0.
Proof.
move=> X_ge0 zero u sz_u reach; rewrite -[LHS](max_r (X_ge0 u sz_u reach)).
apply: (@E_eq0 _ _ p n [::] (fun w => Num.max 0 (X w))) => // [w||]; first by rewrite le_maxr lexx.
  by rewrite -[RHS]zero; apply: eq_E_reachable => // w sz_w reach_w; rewrite max_r ?X_ge0.
by rewrite -sz_u.
Qed.

End Reachable.

(* --- one token at a time ------------------------------------------------------------------------------------------ *)

Section Conditioning.

Variables (R : comRingType) (A : finType) (p : seq A -> A -> R).
Implicit Types (f : seq A -> A -> R) (X Y : seq A -> R).

(* What is known after t tokens comes out of the conditional expectation of the rest. *)
Lemma E_condition H t X Y : (t <= H)%N ->
  E p H [::] (fun w => X (take t w) * Y w) = E p t [::] (fun s => X s * E p (H - t) s Y).
Proof.
move=> le_tH; rewrite (E_split _ _ le_tH); apply: eq_E => s /= sz_s.
by rewrite -(E_known p (H - t) s X Y) sz_s.
Qed.

(* The first and the last of n + 1 tokens. *)
Lemma E_first n s X : E p n.+1 s X = next p s (fun a => E p n (rcons s a) X).
Proof. by []. Qed.

Lemma E_last n s X : E p n.+1 s X = E p n s (fun u => next p u (fun a => X (rcons u a))).
Proof. by rewrite -addn1 E_tower. Qed.

Lemma E_path_sum n f : E p n [::] (path_sum f) = \sum_(t < n) E p n [::] (step f t).
Proof. by rewrite -E_sum; apply: eq_E => w /path_sumE->. Qed.

(* A function of token t + 1 times anything: condition on that token. *)
Lemma E_step_times H t f Y : (t < H)%N ->
  E p H [::] (fun w => step f t w * Y w) =
    E p t [::] (fun s => next p s (fun a => f s a * E p (H - t.+1) (rcons s a) Y)).
Proof.
move=> lt_tH; transitivity (E p H [::] (fun w => step f t (take t.+1 w) * Y w)).
  by apply: eq_E => w _ /=; rewrite step_take.
rewrite E_condition // E_last; apply: eq_E => s /= sz_s.
by apply: eq_bigr => a _; rewrite -sz_s step_rcons.
Qed.

End Conditioning.

Section Tokens.

Variables (R : realFieldType) (A : finType) (p : policy R A) (H t : nat).
Hypothesis lt_tH : (t < H)%N.
Implicit Types (f : seq A -> A -> R) (s : seq A) (X Y : seq A -> R).

(* A function of the history of token t + 1 and of f at that token. *)
Lemma E_token f (G : seq A -> R -> R) :
  E p H [::] (fun w => G (take t w) (step f t w)) = E p t [::] (fun s => next p s (fun a => G s (f s a))).
Proof.
transitivity (E p t.+1 [::] (fun w => G (take t w) (step f t w))).
  rewrite -(E_prefix p (fun w => G (take t w) (step f t w)) lt_tH).
  by apply: eq_E => u _; rewrite take_take ?leqnSn // step_take.
rewrite E_last; apply: eq_E => s /= sz_s; apply: eq_bigr => a _.
by rewrite -sz_s step_rcons -cats1 take_size_cat.
Qed.

Lemma E_step f : E p H [::] (step f t) = E p t [::] (fun s => next p s (f s)).
Proof. exact: (E_token f (fun _ x => x)). Qed.

Lemma E_step0 f : (forall s, next p s (f s) = 0) -> E p H [::] (step f t) = 0.
Proof. by move=> f0; rewrite E_step -[RHS](E0 p t [::]); apply: eq_E => s _; apply: f0. Qed.

(* After a known past a token is worth its mean, *)
Lemma E_known_step f Y : E p H [::] (fun w => Y (take t w) * step f t w) = E p t [::] (fun s => Y s * next p s (f s)).
Proof.
rewrite (E_token f (fun s x => Y s * x)); apply: eq_E => s _.
by rewrite /next big_distrr; apply: eq_bigr => a _; rewrite mulrCA.
Qed.

(* and if that is 0 nothing known before the token changes it: such is a score, whatever baseline multiplies it. *)
Lemma E_centered f X : (forall s, next p s (f s) = 0) -> (forall w, size w = H -> X (take t w) = X w) ->
  E p H [::] (fun w => X w * step f t w) = 0.
Proof.
move=> f0 past; transitivity (E p H [::] (fun w => X (take t w) * step f t w)).
  by apply: eq_E => w /past /= ->.
by rewrite E_known_step -[RHS](E0 p t [::]); apply: eq_E => s _; rewrite f0 mulr0.
Qed.

End Tokens.

(* p writes n tokens and q the rest: the rest enters by its mean given those n tokens. *)
Lemma E_rest (R : realFieldType) (A : finType) (p : policy R A) (q : seq A -> A -> R) H n (X Y : seq A -> R) :
  (n <= H)%N -> (forall w, size w = H -> X (take n w) = X w) ->
  E p n [::] (fun s => E q (H - n) s (fun w => X w * Y w)) =
  E p H [::] (fun w => X w * E q (H - n) (take n w) Y).
Proof.
move=> le_nH known; rewrite [RHS](E_split _ _ le_nH); apply: eq_E => s /= sz_s.
have X_s u : size u = (H - n)%N -> X (s ++ u) = X s.
  by move=> sz_u; rewrite -known ?size_cat ?sz_s ?sz_u ?subnKC // -sz_s take_size_cat.
transitivity (X s * E q (H - n) s Y); first by rewrite -E_scale; apply: eq_E => u /X_s->.
by rewrite -[LHS](E_const p (H - n) s); apply: eq_E => u /X_s->; rewrite -sz_s take_size_cat.
Qed.

(* --- the ratio as a weight ---------------------------------------------------------------------------------------- *)

Section Ratio.

Variables (R : realFieldType) (A : finType) (b pi : policy R A).
Implicit Types (s w : seq A) (X : seq A -> R).
Local Notation rho := (rho b pi).

(* E_b [r^2 | s] = 1 + chi2(s): what one more token makes of the second moment. *)
Lemma next_ratio_sqr s : next b s (fun a => ratio b pi s a ^+ 2) = 1 + chi2 b pi s.
Proof.
rewrite addrC subrK; apply: eq_bigr => a _; rewrite /ratio.
have [-> | a_neq0] := eqVneq (b s a) 0; first by rewrite mul0r invr0 mulr0.
by field.
Qed.

Lemma E_rho_sqr_last t :
  E b t.+1 [::] (fun s => rho s ^+ 2) =
  E b t [::] (fun s => rho s ^+ 2) + E b t [::] (fun s => rho s ^+ 2 * chi2 b pi s).
Proof.
rewrite E_last -E_add; apply: eq_E => s _ /=; transitivity (rho s ^+ 2 * (1 + chi2 b pi s)); last by ring.
rewrite -next_ratio_sqr [RHS]big_distrr.
by apply: eq_bigr => a _; rewrite rho_rcons exprMn mulrCA.
Qed.

Hypothesis AC : absolutely_continuous b pi.

Lemma reachable_AC s : reachable pi s -> reachable b s.
Proof.
elim/last_ind: s => [|s a IHs] //; rewrite !reachable_rcons => /andP[/IHs reach pi_gt0].
by rewrite reach lt_def prob_ge0 andbT; apply: contraL pi_gt0 => /eqP/(AC reach)->; rewrite ltxx.
Qed.

(* The change of measure from the empty history on, and the ratio as a martingale. *)
Lemma E_rho_times n X : E b n [::] (fun w => rho w * X w) = E pi n [::] X.
Proof. by rewrite change_of_measure // rho_nil mul1r. Qed.

Lemma E_rho n s : reachable b s -> E b n s rho = rho s.
Proof.
move=> reach; rewrite -[RHS]mulr1 -[X in _ * X](E_const pi n s) -change_of_measure //.
by apply: eq_E => w _; rewrite mulr1.
Qed.

Lemma Var_rho H t : (t <= H)%N -> Var b H [::] (fun w => rho (take t w)) = E b t [::] (fun s => rho s ^+ 2) - 1.
Proof.
by move=> le_tH; rewrite /Var (E_prefix b (fun s => rho s ^+ 2)) // (E_prefix b rho) // E_rho // rho_nil expr1n.
Qed.

Section Prefix.

Variables (H n : nat).
Hypothesis le_nH : (n <= H)%N.

(* The weight rho_n makes pi write the first n tokens and leaves the others to b. *)
Lemma rho_switches X : E b H [::] (fun w => rho (take n w) * X w) = E pi n [::] (fun s => E b (H - n) s X).
Proof. by rewrite E_condition // E_rho_times. Qed.

(* Prop. 1: so it corrects all that is known once they are written. *)
Lemma E_rho_known X : (forall w, size w = H -> X (take n w) = X w) ->
  E b H [::] (fun w => rho (take n w) * X w) = E pi H [::] X.
Proof.
move=> known; transitivity (E b H [::] (fun w => rho (take n w) * X (take n w))).
  by apply: eq_E => w /known /= ->.
rewrite (E_prefix b (fun s => rho s * X s) le_nH) E_rho_times -(E_prefix pi X le_nH).
by apply: eq_E => w /known.
Qed.

Lemma E_rho_prefix X : E b H [::] (fun w => rho (take n w) * X (take n w)) = E pi H [::] (fun w => X (take n w)).
Proof. by rewrite (E_rho_known (X := fun w => X (take n w))) // => w _; rewrite take_take. Qed.

(* The ratio of the whole string is no better a weight: given the first n tokens its mean is rho_n, and so the mean of
   its square is rho_n^2 at least. *)
Lemma E_rho_sqr_le X : (forall s, 0 <= X s) ->
  E b H [::] (fun w => rho (take n w) ^+ 2 * X (take n w)) <= E b H [::] (fun w => rho w ^+ 2 * X (take n w)).
Proof.
move=> X_ge0; rewrite (E_prefix b (fun s => rho s ^+ 2 * X s) le_nH) [leRHS](E_split _ _ le_nH).
apply: E_le_reachable => s sz_s reach; have := Var_ge0 b (H - n) s rho; rewrite /Var E_rho // subr_ge0.
move=> /(ler_wpmul2r (X_ge0 s)) /le_trans; apply; rewrite mulrC -E_scale le_eqVlt; apply/predU1P; left.
by apply: eq_E => u _; rewrite -sz_s take_size_cat // mulrC.
Qed.

Lemma Var_rho_le X :
  Var b H [::] (fun w => rho (take n w) * X (take n w)) <= Var b H [::] (fun w => rho w * X (take n w)).
Proof.
have sqr r : E b H [::] (fun w => (r w * X (take n w)) ^+ 2) = E b H [::] (fun w => r w ^+ 2 * X (take n w) ^+ 2).
  by apply: eq_E => w _; rewrite exprMn.
rewrite /Var E_rho_prefix E_rho_times ler_add2r (sqr (fun w => rho (take n w))) (sqr rho).
by apply: (E_rho_sqr_le (X := fun s => X s ^+ 2)) => s; apply: sqr_ge0.
Qed.

End Prefix.

End Ratio.
