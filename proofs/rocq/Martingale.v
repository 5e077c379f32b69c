(* The cumulative ratio is a martingale: chapter 1 of the claims, and the population part of chapter 8.

   Under (AC) the ratio of a string has mean 1, and its mean given the tokens so far is the ratio so far. Its second
   moment grows at each token by E_b [rho_t^2 chi2(s_(t+1))], so its variance never falls; it stays the same exactly
   while pi and b agree wherever pi can get to. Of all weights that correct functions of the first t tokens, rho_t has
   the least variance. Without (AC) the mean is the probability that pi stays where b can go.

   As everywhere: the ratio after t tokens of a string w is rho (take t w), a function of the first t tokens is a
   function of take t w, and E b (H - t) s X is the conditional expectation E_b [X | F_t] at a history s of t tokens. *)

From mathcomp Require Import all_ssreflect all_algebra ring.
From ctpo Require Import Trees Expectations.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.Theory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(* --- expectations given an event or a statistic ------------------------------------------------------------------- *)

Section Given.

Variables (R : realFieldType) (A : finType) (p : policy R A) (n : nat).
Implicit Types (X Y : seq A -> R) (D : pred (seq A)).

(* The mean of a variable that is not negative is positive if one value is. *)
Lemma E_gt0P X : (forall u, size u = n -> reachable p u -> 0 <= X u) ->
  0 < E p n [::] X <-> exists u, [/\ size u = n, reachable p u & 0 < X u].
Proof.
move=> X_ge0; split=> [|[u [sz_u reach X_gt0]]].
  have [/existsP[u /andP[reach X_gt0]] _ | ] := boolP [exists u : n.-tuple A, reachable p u && (0 < X u)].
    by exists u; rewrite size_tuple.
  rewrite negb_exists => /forallP none; rewrite ltNge -(E0 p n [::]) E_le_reachable // => u sz_u reach.
  by have /eqP sz := sz_u; have := none (Tuple sz); rewrite reach /= -leNgt.
rewrite lt_def E_ge0_reachable // andbT; apply/eqP => /(E_eq0_reachable X_ge0)/(_ u sz_u reach) X0.
by rewrite X0 ltxx in X_gt0.
Qed.

(* The mean of X given an event, over strings of n tokens. *)
Definition E_given D X : R := E p n [::] (fun w => X w * (D w)%:R) / Pr p n D.

(* The mean of X given the value of a statistic of the string, as a function of that value. *)
Definition E_given_stat (S : eqType) (stat : seq A -> S) X (c : S) : R := E_given (fun w => stat w == c) X.

(* An event of probability 0 carries no part of an expectation. *)
Lemma E_null D X : Pr p n D = 0 -> E p n [::] (fun w => X w * (D w)%:R) = 0.
Proof.
move=> PrD0; rewrite -[RHS](E0 p n [::]); apply: eq_E_reachable => // u sz_u reach.
by rewrite (E_eq0_reachable _ PrD0) ?mulr0 // => w *; apply: ler0n.
Qed.

(* X and its mean given a statistic have the same expectation times any function of the statistic. *)
Lemma E_stat (S : eqType) (stat : seq A -> S) X (h : S -> R) :
  E p n [::] (fun w => X w * h (stat w)) = E p n [::] (fun w => E_given_stat stat X (stat w) * h (stat w)).
Proof.
pose values := undup [seq stat (val u) | u <- enum {: n.-tuple A}].
have by_value (Y : S -> seq A -> R) : E p n [::] (fun w => Y (stat w) w) =
    \sum_(c <- values) E p n [::] (fun w => Y c w * (stat w == c)%:R).
  rewrite -E_sum; apply: eq_E => u /= /eqP sz_u.
  have in_values : stat u \in values by rewrite mem_undup; apply/mapP; exists (Tuple sz_u); rewrite ?mem_enum.
  rewrite (bigD1_seq (stat u)) ?undup_uniq //= eqxx mulr1 big1 ?addr0 // => c.
  by rewrite eq_sym => /negbTE ->; rewrite mulr0.
rewrite (by_value (fun c w => X w * h c)) (by_value (fun c w => E_given_stat stat X c * h c)).
apply: eq_bigr => c _; rewrite E_scale -/(Pr p n _).
transitivity (h c * E p n [::] (fun w => X w * (stat w == c)%:R)).
  by rewrite -E_scale; apply: eq_E => u _; rewrite mulrAC mulrC.
have [zero | nonzero] := eqVneq (Pr p n (fun w => stat w == c)) 0; first by rewrite E_null // zero !mulr0.
by rewrite mulrAC /E_given_stat /E_given divfK // mulrC.
Qed.

(* Rao-Blackwell: averaging given a statistic keeps the mean, and lowers the variance by the mean squared distance. *)
Lemma Var_stat (S : eqType) (stat : seq A -> S) X (h : S -> R) :
  Var p n [::] (fun w => X w * h (stat w)) =
  Var p n [::] (fun w => E_given_stat stat X (stat w) * h (stat w)) +
  E p n [::] (fun w => ((X w - E_given_stat stat X (stat w)) * h (stat w)) ^+ 2).
Proof.
pose Z c := E_given_stat stat X c; rewrite /Var -E_stat addrAC -E_add; congr (_ - _).
have cross := E_stat stat X (fun c => Z c * h c ^+ 2).
transitivity (E p n [::] (fun w => (X w * h (stat w)) ^+ 2) -
  2%:R * (E p n [::] (fun w => X w * (Z (stat w) * h (stat w) ^+ 2)) -
          E p n [::] (fun w => Z (stat w) * (Z (stat w) * h (stat w) ^+ 2)))).
  by rewrite cross subrr mulr0 subr0.
by rewrite -E_sub -E_scale -E_sub; apply: eq_E => u _; rewrite /= -/(Z _); ring.
Qed.

(* Given the first t tokens, the mean is the conditional expectation E p (n - t) s X of the tree. *)
Lemma E_at t s X : (t <= n)%N -> size s = t ->
  E p n [::] (fun w => X w * (take t w == s)%:R) = string_prob p s * E p (n - t) s X.
Proof.
move=> le_tn sz_s; rewrite (E_split _ _ le_tn).
transitivity (E p t [::] (fun u => (u == s)%:R * E p (n - t) u X)).
  apply: eq_E => u /= sz_u; rewrite -E_scale; apply: eq_E => v _.
  by rewrite -sz_u take_size_cat // mulrC.
have /eqP sz := sz_s; rewrite E_big (bigD1 (Tuple sz)) //= eqxx mul1r [X in _ + X]big1 ?addr0 => [|u neq].
  by rewrite /string_prob /path_prod sz_s.
by rewrite -[s]/(val (Tuple sz)) val_eqE (negbTE neq) mul0r mulr0.
Qed.

Lemma E_given_prefix t s X : (t <= n)%N -> size s = t -> reachable p s ->
  E_given_stat (take t) X s = E p (n - t) s X.
Proof.
move=> le_tn sz_s reach; rewrite /E_given_stat /E_given E_at //.
have -> : Pr p n (fun w => take t w == s) = string_prob p s.
  transitivity (E p n [::] (fun w => 1 * (take t w == s)%:R)); first by apply: eq_E => u _; rewrite mul1r.
  by rewrite E_at // E_const mulr1.
by rewrite mulrC mulKf // lt0r_neq0.
Qed.

End Given.

(* --- without absolute continuity ---------------------------------------------------------------------------------- *)

Section Support.

Variables (R : realFieldType) (A : finType) (b pi : policy R A).
Implicit Types (s u w : seq A) (X : seq A -> R).

(* The change of measure without (AC): what pi writes where b cannot go is lost. *)
Lemma change_of_measure_support n s X : reachable b s ->
  E b n s (fun w => rho b pi w * X w) = rho b pi s * E pi n s (fun w => (reachable b w)%:R * X w).
Proof.
elim: n s => [|n IHn] s reach /=; first by rewrite reach mul1r.
rewrite big_distrr /=; apply: eq_bigr => a _; have [a0 | a_neq0] := eqVneq (b s a) 0.
  rewrite a0 mul0r (_ : E pi n (rcons s a) _ = 0) ?mulr0 // -[RHS](E0 pi n (rcons s a)).
  apply: eq_E => u _; rewrite (_ : reachable b _ = false) ?mul0r //; apply/negP => /reachable_cat.
  by rewrite reachable_rcons a0 ltxx andbF.
have a_gt0 : 0 < b s a by rewrite prob_gt0.
by rewrite IHn ?reachable_rcons ?reach // rho_rcons /ratio; field; rewrite a_neq0.
Qed.

(* 1.support: for any two policies, E_b rho_t = P_pi (the first t tokens are ones that b can write). The strings that b
   cannot write are not in the sample, so their share of pi is missing from the mean. *)
Theorem claim_1_support H t : (t <= H)%N ->
  E b H [::] (fun w => rho b pi (take t w)) = Pr pi H (fun w => reachable b (take t w)).
Proof.
move=> le_tH; rewrite /Pr !(E_prefix _ _ le_tH) (E_prefix pi (fun w => (reachable b w)%:R) le_tH).
transitivity (E b t [::] (fun w => rho b pi w * 1)); first by apply: eq_E => u _; rewrite mulr1.
rewrite change_of_measure_support // rho_nil mul1r.
by apply: eq_E => u _; rewrite mulr1.
Qed.

(* 1.support, as a sum over strings of t tokens: E_b rho_t = sum of P_pi(s) over the s with P_b(s) > 0. *)
Theorem claim_1_support_sum H t : (t <= H)%N ->
  E b H [::] (fun w => rho b pi (take t w)) = \sum_(s : t.-tuple A | reachable b s) string_prob pi s.
Proof.
move=> le_tH; rewrite claim_1_support // /Pr (E_prefix pi (fun w => (reachable b w)%:R) le_tH) E_strings.
by rewrite [RHS]big_mkcond; apply: eq_bigr => s _; case: (reachable b s); rewrite ?mulr1 ?mulr0.
Qed.

(* 1.support: so the mean is never above 1, *)
Theorem claim_1_support_le1 H t : (t <= H)%N -> E b H [::] (fun w => rho b pi (take t w)) <= 1.
Proof.
move=> le_tH; rewrite claim_1_support // -[leRHS](E_const pi H [::]).
by apply: E_le => w; case: (reachable b _); rewrite ?ler01.
Qed.

(* and below 1 exactly if pi can write t tokens that b cannot. *)
Theorem claim_1_support_lt1 H t : (t <= H)%N ->
  E b H [::] (fun w => rho b pi (take t w)) < 1 <->
  exists s, [/\ size s = t, reachable pi s & ~~ reachable b s].
Proof.
move=> le_tH; rewrite claim_1_support // /Pr (E_prefix pi (fun w => (reachable b w)%:R) le_tH).
have -> : (E pi t [::] (fun w => (reachable b w)%:R) < 1) = (0 < E pi t [::] (fun w => 1 - (reachable b w)%:R)).
  by rewrite E_sub E_const subr_gt0.
have ge0 (w : seq A) : 0 <= 1 - (reachable b w)%:R :> R by case: (reachable b w); rewrite ?subrr ?subr0 ?ler01.
rewrite E_gt0P //; split=> -[s [sz_s reach]] b_s; exists s; split=> //.
  by move: b_s; case: (reachable b s); rewrite ?subrr ?ltxx.
by rewrite (negbTE b_s) subr0 ltr01.
Qed.

End Support.

(* --- absolute continuity: the martingale -------------------------------------------------------------------------- *)

(* A function that is convex on the non-negative numbers. *)
Definition convex (R : realFieldType) (phi : R -> R) := forall x y l, 0 <= x -> 0 <= y -> 0 <= l <= 1 ->
  phi (l * x + (1 - l) * y) <= l * phi x + (1 - l) * phi y.

Lemma weights_eq0 (R : realFieldType) (I : Type) (r : seq I) (q f : I -> R) :
  (forall i, 0 <= q i) -> \sum_(i <- r) q i = 0 -> \sum_(i <- r) q i * f i = 0.
Proof.
move=> q_ge0; elim: r => [|i r IHr]; rewrite ?big_nil // !big_cons => /eqP.
by rewrite paddr_eq0 ?sumr_ge0 // => /andP[/eqP-> /eqP/IHr->]; rewrite mul0r add0r.
Qed.

(* Jensen's inequality for finite sums. *)
Lemma jensen (R : realFieldType) (phi : R -> R) (I : Type) (r : seq I) (q x : I -> R) : convex phi ->
  (forall i, 0 <= q i) -> (forall i, 0 <= x i) -> 0 < \sum_(i <- r) q i ->
  (\sum_(i <- r) q i) * phi ((\sum_(i <- r) q i * x i) / \sum_(i <- r) q i) <= \sum_(i <- r) q i * phi (x i).
Proof.
move=> cvx q_ge0 x_ge0; elim: r => [|i r IHr]; rewrite !(big_nil, big_cons) ?ltxx //.
set S := \sum_(j <- r) q j in IHr *; set T := \sum_(j <- r) q j * x j in IHr *; move=> S'_gt0.
have T_ge0 : 0 <= T by apply: sumr_ge0 => j _; rewrite mulr_ge0.
have [S0 | S_neq0] := eqVneq S 0.
  rewrite S0 addr0 in S'_gt0 *; rewrite /T !weights_eq0 // !addr0.
  by rewrite [q i * x i]mulrC mulfK ?lt0r_neq0.
have S_gt0 : 0 < S by rewrite lt_def S_neq0 sumr_ge0.
have S'_neq0 := lt0r_neq0 S'_gt0; have := cvx (x i) (T / S) (q i / (q i + S)).
have -> : 1 - q i / (q i + S) = S / (q i + S) by field; rewrite S'_neq0.
have -> : q i / (q i + S) * x i + S / (q i + S) * (T / S) = (q i * x i + T) / (q i + S).
  by field; rewrite S'_neq0 S_neq0.
move=> /(_ (x_ge0 i)) bound; have {bound}/(ler_wpmul2l (ltW S'_gt0)) : phi ((q i * x i + T) / (q i + S)) <=
    q i / (q i + S) * phi (x i) + S / (q i + S) * phi (T / S).
  apply: bound; first by rewrite divr_ge0 ?(ltW S_gt0).
  by rewrite divr_ge0 ?(ltW S'_gt0) //= ler_pdivr_mulr // mul1r ler_addl ltW.
move=> /le_trans; apply; rewrite [leLHS](_ : _ = q i * phi (x i) + S * phi (T / S)); last by field; rewrite S'_neq0.
by rewrite ler_add2l IHr.
Qed.

Section Martingale.

Variables (R : realFieldType) (A : finType) (b pi : policy R A).
Implicit Types (s w : seq A) (X : seq A -> R) (phi : R -> R).
Hypothesis AC : absolutely_continuous b pi.

Lemma rho_gt0 s : reachable b s -> (0 < rho b pi s) = reachable pi s.
Proof. by move=> reach; rewrite rho_string_prob // pmulr_lgt0 ?invr_gt0. Qed.

(* 1.martingale: E_b [rho_u | F_t] = rho_t for t <= u <= H, at every history of t tokens that b can write. The change of
   measure turns the mean of rho_u given a history into its ratio times the mean of 1 under pi. *)
Theorem claim_1_martingale_between H t u s : (t <= u <= H)%N -> size s = t -> reachable b s ->
  E b (H - t) s (fun w => rho b pi (take u w)) = rho b pi s.
Proof.
move=> /andP[le_tu le_uH] sz_s reach.
have -> : (H - t = (u - t) + (H - u))%N by rewrite addnC addnBA // subnK.
rewrite E_tower -[RHS](E_rho AC (u - t) reach); apply: eq_E => v sz_v.
by rewrite -(E_past b (H - u) (s ++ v) (rho b pi)) size_cat sz_s sz_v subnKC.
Qed.

(* 1.martingale: E_b [rho_H | F_t] = rho_t. *)
Theorem claim_1_martingale_conditional H t s : (t <= H)%N -> size s = t -> reachable b s ->
  E b (H - t) s (rho b pi) = rho b pi s.
Proof. by move=> _ _; apply: E_rho. Qed.

(* 1.martingale: E_b rho_t = 1 for every t up to the horizon H. *)
Theorem claim_1_martingale H t : (t <= H)%N -> E b H [::] (fun w => rho b pi (take t w)) = 1.
Proof. by move=> le_tH; rewrite (E_prefix b (rho b pi) le_tH) E_rho // rho_nil. Qed.

(* 1.survivors: for an event "alive" that is known after t tokens, E_b [rho_t | alive] = P_pi(alive) / P_b(alive). *)
Theorem claim_1_survivors H t (alive : pred (seq A)) : (t <= H)%N ->
  E_given b H (fun w => alive (take t w)) (fun w => rho b pi (take t w)) =
  Pr pi H (fun w => alive (take t w)) / Pr b H (fun w => alive (take t w)).
Proof.
move=> le_tH; rewrite /E_given; congr (_ / _); rewrite /Pr.
exact: (E_rho_prefix AC le_tH (fun s => (alive s)%:R)).
Qed.

(* --- its second moment -------------------------------------------------------------------------------------------- *)

(* chi2(s) = sum_a (pi(a|s) - b(a|s))^2 / b(a|s): not negative, and positive where the policies differ. *)
Lemma chi2_square s : reachable b s -> chi2 b pi s = \sum_a (pi s a - b s a) ^+ 2 / b s a.
Proof.
move=> reach; rewrite /chi2.
have -> : 1 = \sum_a (2%:R * pi s a - b s a) by rewrite sumrB -big_distrr /= !prob_sum1 mulr1 -addn1 natrD addrK.
rewrite -sumrB; apply: eq_bigr => a _; have [a0 | a_neq0] := eqVneq (b s a) 0.
  by rewrite a0 (AC reach a0) invr0; ring.
by field; rewrite a_neq0.
Qed.

Lemma chi2_ge0 s : reachable b s -> 0 <= chi2 b pi s.
Proof. by move=> reach; rewrite chi2_square // sumr_ge0 // => a _; rewrite divr_ge0 ?sqr_ge0 ?prob_ge0. Qed.

Lemma chi2_gt0P s : reachable b s -> 0 < chi2 b pi s <-> exists a, pi s a != b s a.
Proof.
move=> reach; rewrite chi2_square //.
have term_ge0 a : 0 <= (pi s a - b s a) ^+ 2 / b s a by rewrite divr_ge0 ?sqr_ge0 ?prob_ge0.
split=> [|[a differ]].
  have [/existsP[a differ] _ | ] := boolP [exists a, pi s a != b s a]; first by exists a.
  rewrite negb_exists => /forallP same; rewrite big1 ?ltxx // => a _.
  by have := same a; rewrite negbK => /eqP->; rewrite subrr expr0n mul0r.
rewrite (bigD1 a) //= ltr_paddr ?sumr_ge0 // divr_gt0 //.
  by rewrite lt_def sqrf_eq0 subr_eq0 differ sqr_ge0.
by rewrite lt_def prob_ge0 andbT; apply: contraNneq differ => a0; rewrite a0 (AC reach a0).
Qed.

(* 1.variance: Var(rho_(t+1)) - Var(rho_t) = E_b [rho_t^2 chi2(s_(t+1))], for t < H. Both means are 1, so it is the step
   of the second moment: given the tokens so far, rho_(t+1)^2 has mean rho_t^2 (1 + chi2). *)
Theorem claim_1_variance H t : (t < H)%N ->
  Var b H [::] (fun w => rho b pi (take t.+1 w)) - Var b H [::] (fun w => rho b pi (take t w)) =
  E b H [::] (fun w => rho b pi (take t w) ^+ 2 * chi2 b pi (take t w)).
Proof.
move=> lt_tH; have le_tH := ltnW lt_tH; rewrite !Var_rho // E_rho_sqr_last.
by rewrite (E_prefix b (fun s => rho b pi s ^+ 2 * chi2 b pi s) le_tH); ring.
Qed.

Lemma gain_ge0 H t : 0 <= E b H [::] (fun w => rho b pi (take t w) ^+ 2 * chi2 b pi (take t w)).
Proof. by apply: E_ge0_reachable => u _ reach; rewrite mulr_ge0 ?sqr_ge0 ?chi2_ge0 // reachable_take. Qed.

(* The same from t tokens to u: the gains of the tokens between them add up. *)
Lemma Var_gains H t u : (t <= u <= H)%N ->
  Var b H [::] (fun w => rho b pi (take u w)) - Var b H [::] (fun w => rho b pi (take t w)) =
  \sum_(t <= k < u) E b H [::] (fun w => rho b pi (take k w) ^+ 2 * chi2 b pi (take k w)).
Proof.
move=> /andP[le_tu le_uH]; rewrite -(telescope_sumr (fun k => Var b H [::] (fun w => rho b pi (take k w))) le_tu).
by apply: eq_big_nat => k /andP[_ lt_ku]; rewrite claim_1_variance // (leq_trans lt_ku).
Qed.

(* 1.variance: so the variance never falls, *)
Theorem claim_1_variance_monotone H t u : (t <= u <= H)%N ->
  Var b H [::] (fun w => rho b pi (take t w)) <= Var b H [::] (fun w => rho b pi (take u w)).
Proof. by move=> tuH; rewrite -subr_ge0 Var_gains // sumr_ge0 // => k _; apply: gain_ge0. Qed.

Lemma jensen_E phi n s X : convex phi -> (forall w, 0 <= X w) -> phi (E b n s X) <= E b n s (fun w => phi (X w)).
Proof.
move=> cvx X_ge0; elim: n s => //= n IHn s.
have := @jensen _ phi _ (index_enum A) (b s) (fun a => E b n (rcons s a) X) cvx (prob_ge0 b s).
rewrite prob_sum1 mul1r divr1 => /(_ _ ltr01)/le_trans; apply; first by move=> a; apply: E_ge0.
by apply: ler_sum => a _; rewrite ler_wpmul2l ?prob_ge0.
Qed.

(* and neither does the mean of any convex function of the ratio: E_b phi(rho_t) <= E_b phi(rho_u), by Jensen's
   inequality at each history of t tokens. *)
Theorem claim_1_variance_convex H t u phi : (t <= u <= H)%N -> convex phi ->
  E b H [::] (fun w => phi (rho b pi (take t w))) <= E b H [::] (fun w => phi (rho b pi (take u w))).
Proof.
move=> tuH cvx; have /andP[le_tu le_uH] := tuH; have le_tH := leq_trans le_tu le_uH.
rewrite (E_prefix b (fun s => phi (rho b pi s)) le_tH) (E_split b _ le_tH) -subr_ge0 -E_sub.
apply: E_ge0_reachable => s sz_s reach; rewrite subr_ge0 -(claim_1_martingale_between tuH sz_s reach).
by apply: jensen_E => // w; apply: rho_ge0.
Qed.

(* 1s.strict: Var(rho_t) < Var(rho_H) if and only if, at some history of t to H - 1 tokens that pi can write, pi and b
   differ at the next token. The gains add up to the difference; each is a mean of rho^2 chi2, positive where rho is
   (pi gets there) and chi2 is (the policies differ there). *)
Theorem claim_1s_strict H t : (t <= H)%N ->
  Var b H [::] (fun w => rho b pi (take t w)) < Var b H [::] (rho b pi) <->
  exists s, [/\ (t <= size s < H)%N, reachable pi s & exists a, pi s a != b s a].
Proof.
move=> le_tH; rewrite -subr_gt0.
have -> : Var b H [::] (rho b pi) = Var b H [::] (fun w => rho b pi (take H w)).
  by apply: eq_Var => u sz_u; rewrite take_oversize // sz_u.
rewrite Var_gains ?le_tH ?leqnn //.
pose gain k s := rho b pi (take k s) ^+ 2 * chi2 b pi (take k s).
have pos k : 0 < E b H [::] (gain k) <-> exists u, [/\ size u = H, reachable b u & 0 < gain k u].
  by apply: E_gt0P => u _ reach; rewrite mulr_ge0 ?sqr_ge0 ?chi2_ge0 // reachable_take.
split=> [sum_gt0 | [s [/andP[le_ts lt_sH] reach differ]]].
  have [/hasP[k] | ] := boolP (has (fun k => 0 < E b H [::] (gain k)) (index_iota t H)).
    rewrite mem_index_iota => /andP[le_tk lt_kH] /pos[u [sz_u reach]].
    have b_s := reachable_take k reach; have sz : size (take k u) = k by rewrite size_takel // sz_u ltnW.
    move=> gain_gt0; have rho_neq0 : rho b pi (take k u) != 0.
      by apply: contraTneq gain_gt0 => zero; rewrite /gain zero expr0n mul0r ltxx.
    exists (take k u); rewrite sz le_tk lt_kH -rho_gt0 // lt_def rho_neq0 rho_ge0; split=> //.
    by apply/(chi2_gt0P b_s); move: gain_gt0; rewrite /gain pmulr_rgt0 // lt_def sqrf_eq0 rho_neq0 sqr_ge0.
  move=> /hasPn none; move: sum_gt0; rewrite big_seq big1 ?ltxx // => k /none.
  by rewrite -leNgt => le0; apply/eqP; rewrite eq_le le0 gain_ge0.
have b_s := reachable_AC AC reach.
rewrite (bigD1_seq (size s)) ?mem_index_iota ?le_ts ?iota_uniq //= ltr_paddr //.
  by rewrite sumr_ge0 // => k _; apply: gain_ge0.
rewrite (E_prefix b (fun s => rho b pi s ^+ 2 * chi2 b pi s) (ltnW lt_sH)).
apply/E_gt0P => [u _ b_u|]; first by rewrite mulr_ge0 ?sqr_ge0 ?chi2_ge0.
exists s; split=> //; rewrite mulr_gt0 //; last exact/(chi2_gt0P b_s).
by rewrite exprn_gt0 // rho_gt0.
Qed.

(* 1s.strict, the other side: the two variances are equal if and only if pi is b at every history of t to H - 1 tokens
   that pi can write. *)
Theorem claim_1s_strict_equal H t : (t <= H)%N ->
  Var b H [::] (fun w => rho b pi (take t w)) = Var b H [::] (rho b pi) <->
  forall s, (t <= size s < H)%N -> reachable pi s -> pi s =1 b s.
Proof.
move=> le_tH; have strict := claim_1s_strict le_tH; split=> [eqV s tsH reach a | same].
  apply/eqP; case: eqVneq => // differ; suff : Var b H [::] (rho b pi) < Var b H [::] (rho b pi) by rewrite ltxx.
  by rewrite -{1}eqV; apply/strict; exists s; split=> //; exists a.
apply/eqP; rewrite eq_le; apply/andP; split.
  have -> : Var b H [::] (rho b pi) = Var b H [::] (fun w => rho b pi (take H w)).
    by apply: eq_Var => u sz_u; rewrite take_oversize // sz_u.
  by rewrite claim_1_variance_monotone // le_tH leqnn.
rewrite leNgt; apply/negP => /strict[s [tsH reach [a]]].
by rewrite (same s tsH reach) eqxx.
Qed.

End Martingale.

(* --- the least variance ------------------------------------------------------------------------------------------- *)

Section Optimal.

Variables (R : realFieldType) (A : finType) (b pi : policy R A) (H t : nat).
Hypothesis le_tH : (t <= H)%N.
Implicit Types (s u : seq A) (w : seq A -> R) (f : seq A -> R).

(* A weight w, any function of the whole string, corrects the functions of the first t tokens if E_b [w f] = E_pi [f]
   for all of them. *)
Definition corrects w := forall f, E b H [::] (fun u => w u * f (take t u)) = E pi H [::] (fun u => f (take t u)).

(* 1.optimal: such a weight has E_b [w | F_t] = rho_t wherever b can get to. Take for f the indicator of a history. *)
Theorem claim_1_optimal w : corrects w -> forall s, size s = t -> reachable b s -> E b (H - t) s w = rho b pi s.
Proof.
move=> unbiased s sz_s reach; have := unbiased (fun u => (u == s)%:R); rewrite E_at //.
have -> : E pi H [::] (fun u => (take t u == s)%:R) = E pi H [::] (fun u => 1 * (take t u == s)%:R).
  by apply: eq_E => u _; rewrite mul1r.
rewrite E_at // E_const mulr1 rho_string_prob // => <-.
by rewrite mulrC mulKf // lt0r_neq0.
Qed.

(* 1.optimal: under (AC) every weight with E_b [w | F_t] = rho_t is such a weight ... *)
Theorem claim_1_optimal_corrects w : absolutely_continuous b pi ->
  (forall s, size s = t -> reachable b s -> E b (H - t) s w = rho b pi s) -> corrects w.
Proof.
move=> AC mean f; rewrite (E_split b _ le_tH) (E_prefix pi f le_tH).
transitivity (E b t [::] (fun s => rho b pi s * f s)).
  apply: eq_E_reachable => // s sz_s reach.
  rewrite -mean // mulrC /= -E_scale; apply: eq_E => u _.
  by rewrite -sz_s take_size_cat // mulrC.
by rewrite E_rho_times.
Qed.

(* ... and rho_t itself is one. *)
Theorem claim_1_optimal_rho : absolutely_continuous b pi -> corrects (fun u => rho b pi (take t u)).
Proof.
move=> AC; apply: claim_1_optimal_corrects => // s sz_s _.
by rewrite -[RHS](E_past b (H - t) s (rho b pi)) sz_s.
Qed.

(* Weights with the conditional mean rho_t; by claim_1_optimal all that correct the functions of the first t tokens. *)
Section GivenMean.

Variable w : seq A -> R.
Hypothesis mean_w : forall s, size s = t -> reachable b s -> E b (H - t) s w = rho b pi s.

(* 1.optimal: Var_b (w f) = Var_b (rho_t f) + E_b [((w - rho_t) f)^2] for every function f of the first t tokens:
   Rao-Blackwell, as rho_t is the mean of w given those tokens. *)
Theorem claim_1_optimal_gap f :
  Var b H [::] (fun u => w u * f (take t u)) =
  Var b H [::] (fun u => rho b pi (take t u) * f (take t u)) +
  E b H [::] (fun u => ((w u - rho b pi (take t u)) * f (take t u)) ^+ 2).
Proof.
have averaged u : size u = H -> reachable b ([::] ++ u) -> E_given_stat b H (take t) w (take t u) = rho b pi (take t u).
  move=> sz_u reach; have sz : size (take t u) = t by rewrite size_takel ?sz_u.
  by rewrite (E_given_prefix _ le_tH sz) ?mean_w // reachable_take.
rewrite (Var_stat b H (take t) w f); congr (_ - _ ^+ 2 + _).
all: by apply: eq_E_reachable => // u sz_u reach; rewrite averaged.
Qed.

(* 1.optimal: so no such weight has a smaller variance, whatever it multiplies. *)
Theorem claim_1_optimal_variance f :
  Var b H [::] (fun u => rho b pi (take t u) * f (take t u)) <= Var b H [::] (fun u => w u * f (take t u)).
Proof. by rewrite claim_1_optimal_gap ler_addl E_ge0 // => u; apply: sqr_ge0. Qed.

(* 1.optimal: and only rho_t has that variance: Var_b w = Var_b rho_t if and only if w = rho_t on every string that b
   can write. *)
Theorem claim_1_optimal_unique :
  Var b H [::] w = Var b H [::] (fun u => rho b pi (take t u)) <->
  forall u, size u = H -> reachable b u -> w u = rho b pi (take t u).
Proof.
have one (X : seq A -> R) : Var b H [::] X = Var b H [::] (fun u => X u * 1).
  by apply: eq_Var => u _; rewrite mulr1.
rewrite (one w) (one (fun u => rho b pi (take t u))) (claim_1_optimal_gap (fun=> 1)).
set V := Var _ _ _ _; split=> [eqV u sz_u reach | same].
  have zero : E b H [::] (fun u => ((w u - rho b pi (take t u)) * 1) ^+ 2) = 0 by apply: (addrI V); rewrite addr0.
  have := E_eq0_reachable (fun u _ _ => sqr_ge0 _) zero sz_u reach.
  by move/eqP; rewrite mulr1 sqrf_eq0 subr_eq0 => /eqP.
rewrite -[RHS]addr0; congr (_ + _); rewrite -[RHS](E0 b H [::]).
apply: eq_E_reachable => // u sz_u reach.
by rewrite same // subrr mul0r expr0n.
Qed.

End GivenMean.

(* 1.optimal, in one sentence: of all weights that correct the functions of the first t tokens, rho_t has the least
   variance, whatever function of them it multiplies. *)
Theorem claim_1_optimal_among_unbiased w f : corrects w ->
  Var b H [::] (fun u => rho b pi (take t u) * f (take t u)) <= Var b H [::] (fun u => w u * f (take t u)).
Proof. by move=> unbiased; apply: claim_1_optimal_variance => s sz_s reach; apply: claim_1_optimal sz_s reach. Qed.

End Optimal.

(* Integrands that depend on less than the first t tokens: on a statistic of them, such as a state at which histories
   merge. *)
Section Merged.

Variables (R : realFieldType) (A : finType) (b pi : policy R A) (H t : nat) (S : eqType) (state : seq A -> S).
Hypothesis le_tH : (t <= H)%N.
Hypothesis AC : absolutely_continuous b pi.
Implicit Types (c : S) (h : S -> R) (w : seq A -> R).

(* E_b [rho_t | state of the first t tokens], as a function of the state. *)
Definition merged_weight c : R :=
  E_given_stat b H (fun u => state (take t u)) (fun u => rho b pi (take t u)) c.

Lemma rho_state h : E b H [::] (fun u => rho b pi (take t u) * h (state (take t u))) =
  E pi H [::] (fun u => h (state (take t u))).
Proof. exact: (E_rho_prefix AC le_tH (fun s => h (state s))). Qed.

(* 1.optimal: the merged weight corrects the functions of the state. *)
Theorem claim_1_optimal_merged_unbiased h :
  E b H [::] (fun u => merged_weight (state (take t u)) * h (state (take t u))) =
  E pi H [::] (fun u => h (state (take t u))).
Proof. by rewrite -rho_state [RHS](E_stat b H (fun u => state (take t u)) (fun u => rho b pi (take t u)) h). Qed.

(* 1.optimal: and it has the least variance of all weights that do, rho_t among them: their means given the state are
   all the same, P_pi(state) / P_b(state). *)
Theorem claim_1_optimal_merged w h :
  (forall k, E b H [::] (fun u => w u * k (state (take t u))) = E pi H [::] (fun u => k (state (take t u)))) ->
  Var b H [::] (fun u => merged_weight (state (take t u)) * h (state (take t u))) <=
  Var b H [::] (fun u => w u * h (state (take t u))).
Proof.
move=> unbiased; rewrite [leRHS](Var_stat b H (fun u => state (take t u)) w h).
have same c : E_given_stat b H (fun u => state (take t u)) w c = merged_weight c.
  rewrite /merged_weight /E_given_stat /E_given; congr (_ / _).
  by rewrite (unbiased (fun d => (d == c)%:R)) -(rho_state (fun d => (d == c)%:R)).
have -> : Var b H [::] (fun u => merged_weight (state (take t u)) * h (state (take t u))) =
    Var b H [::] (fun u => E_given_stat b H (fun u => state (take t u)) w (state (take t u)) * h (state (take t u))).
  by apply: eq_Var => u _; rewrite same.
by rewrite ler_addl E_ge0 // => u; apply: sqr_ge0.
Qed.

(* 1.optimal: in particular averaging rho_t over the histories of a state never adds variance. *)
Theorem claim_1_optimal_merged_below_rho h :
  Var b H [::] (fun u => merged_weight (state (take t u)) * h (state (take t u))) <=
  Var b H [::] (fun u => rho b pi (take t u) * h (state (take t u))).
Proof. by apply: claim_1_optimal_merged => k; apply: rho_state. Qed.

(* 1.optimal: the merged weight is the ratio of the probabilities of the state. *)
Theorem claim_1_optimal_merged_ratio c : merged_weight c =
  Pr pi H (fun u => state (take t u) == c) / Pr b H (fun u => state (take t u) == c).
Proof. by rewrite /merged_weight /E_given_stat /E_given (rho_state (fun d => (d == c)%:R)). Qed.

End Merged.

(* --- effective sample size ---------------------------------------------------------------------------------------- *)

Section EffectiveSampleSize.

Variables (R : realFieldType) (A : finType) (b pi : policy R A) (H : nat).
Hypothesis AC : absolutely_continuous b pi.

(* The effective sample size of rho_t per sequence drawn, (E_b rho_t)^2 / E_b rho_t^2 with E_b rho_t = 1. *)
Definition ess t : R := (E b H [::] (fun w => rho b pi (take t w) ^+ 2))^-1.

(* The largest rho_t of a string that b can write. *)
Definition largest_weight t : R := \big[Num.max/0]_(s : t.-tuple A | reachable b s) rho b pi s.

Lemma essE t : (t <= H)%N -> ess t = (1 + Var b H [::] (fun w => rho b pi (take t w)))^-1.
Proof. by move=> le_tH; rewrite /Var (claim_1_martingale AC le_tH) expr1n addrC subrK. Qed.

Lemma one_Var_gt0 (X : seq A -> R) : 0 < 1 + Var b H [::] X.
Proof. by rewrite ltr_paddr ?Var_ge0 ?ltr01. Qed.

(* 8.population: the second moment is 1 plus the variance, so it never falls, and the effective sample size never
   rises. *)
Theorem claim_8_population t u : (t <= u <= H)%N -> ess u <= ess t.
Proof.
move=> tuH; have /andP[le_tu le_uH] := tuH; rewrite !essE ?(leq_trans le_tu) // lef_pinv ?posrE ?one_Var_gt0 //.
by rewrite ler_add2l claim_1_variance_monotone.
Qed.

(* 8.population: it is never above 1. *)
Theorem claim_8_population_le1 t : (t <= H)%N -> ess t <= 1.
Proof. by move=> le_tH; rewrite essE // invf_le1 ?one_Var_gt0 // ler_addl Var_ge0. Qed.

(* A token that b writes and whose ratio is at least 1: the ratios of a history have mean 1. *)
Lemma ratio_ge1 s : reachable b s -> exists2 a, 0 < b s a & 1 <= ratio b pi s a.
Proof.
move=> reach; have [/existsP[a /andP[]] | ] := boolP [exists a, (0 < b s a) && (1 <= ratio b pi s a)].
  by exists a.
rewrite negb_exists => /forallP below.
have gap a : 0 <= b s a - pi s a /\ (0 < b s a -> 0 < b s a - pi s a).
  have -> : b s a - pi s a = b s a * (1 - ratio b pi s a) by rewrite mulrBr mulr1 b_ratio.
  have [-> | neq0] := eqVneq (b s a) 0; first by rewrite mul0r ltxx.
  have gt0 : 0 < b s a by rewrite prob_gt0.
  have := below a; rewrite gt0 -ltNge /= => lt1.
  by split=> [|_]; rewrite ?pmulr_rge0 ?pmulr_rgt0 // ?subr_ge0 ?subr_gt0 // ltW.
have sum0 : \sum_a (b s a - pi s a) = 0 by rewrite sumrB !prob_sum1 subrr.
have none a : b s a = 0.
  have eq0 := @psumr_eq0P _ _ xpredT (fun a => b s a - pi s a) (fun a _ => proj1 (gap a)) sum0 a isT.
  have [// | neq0] := eqVneq (b s a) 0; have := proj2 (gap a).
  by rewrite prob_gt0 eq0 ltxx => /(_ neq0).
by have /eqP := prob_sum1 b s; rewrite big1 // eq_sym oner_eq0.
Qed.

(* 8.population: every string that b can write goes on, token by token, to one of at least its ratio, *)
Theorem claim_8_population_continues n s : reachable b s ->
  exists v, [/\ size v = n, reachable b (s ++ v) & rho b pi s <= rho b pi (s ++ v)].
Proof.
move=> reach; elim: n => [|n [v [sz_v b_sv le]]]; first by exists [::]; rewrite cats0.
have [a a_gt0 ge1] := ratio_ge1 b_sv; exists (rcons v a).
rewrite size_rcons sz_v -rcons_cat reachable_rcons b_sv a_gt0 rho_rcons; split=> //.
by rewrite (le_trans le) // ler_pemulr // rho_ge0.
Qed.

Lemma le_largest t (s : seq A) : size s = t -> reachable b s -> rho b pi s <= largest_weight t.
Proof.
move=> /eqP sz reach; rewrite /largest_weight.
have: Tuple sz \in index_enum [finType of t.-tuple A] by apply: mem_index_enum.
elim: (index_enum _) => //= v r IHr; rewrite inE big_cons => /predU1P[<- | /IHr le].
  by rewrite reach le_maxr lexx.
by case: ifP => // _; rewrite le_maxr le orbT.
Qed.

(* 8.population: so the largest weight never falls. *)
Theorem claim_8_population_largest t u : (t <= u)%N -> largest_weight t <= largest_weight u.
Proof.
move=> le_tu; rewrite {1}/largest_weight; elim/big_rec: _ => [|s x reach le_x].
  by rewrite /largest_weight; elim/big_rec: _ => // s x _ ge0; rewrite le_maxr ge0 orbT.
rewrite le_maxl le_x andbT; have [v [sz_v b_sv le]] := @claim_8_population_continues (u - t) s reach.
by apply: (le_trans le); apply: le_largest => //; rewrite size_cat size_tuple sz_v subnKC.
Qed.

End EffectiveSampleSize.
