"""The controller against naive LSTM cells and against enumeration; PPO's invariants; the early stop; a
planted genotype."""
import copy
import io
import itertools
import math
import random

import pytest
import torch

import controller
from controller import PPO, Controller, EarlyStop


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scaled(model, factor):
    """The same controller with larger parameters, so that what it samples now sways what it samples next."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def naive(model, string):
    """log-probability and entropy of one string: LSTM cells written out, no batch, float64."""
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    h = [torch.zeros(model.lstm.hidden_size, dtype=torch.float64) for _ in range(2)]
    c = [x.clone() for x in h]
    log_prob = entropy = 0.0
    x = weights["embed.weight"][-1]
    for t, token in enumerate(string.tolist()):
        for k in range(2):
            gates = weights[f"lstm.weight_ih_l{k}"] @ x + weights[f"lstm.bias_ih_l{k}"] \
                + weights[f"lstm.weight_hh_l{k}"] @ h[k] + weights[f"lstm.bias_hh_l{k}"]
            i, f, g, o = gates.chunk(4)
            c[k] = f.sigmoid() * c[k] + i.sigmoid() * g.tanh()
            h[k] = x = o.sigmoid() * c[k].tanh()
        logits = weights[f"heads.{t}.weight"] @ x + weights[f"heads.{t}.bias"]
        p = logits.exp() / logits.exp().sum()
        log_prob += math.log(p[token])
        entropy -= sum(q * math.log(q) for q in p.tolist())
        x = weights["embed.weight"][model.rows[t] + token]
    return log_prob, entropy


# ---- The policy ----------------------------------------------------------------------------------

def test_parameters_start_uniform():
    """Sect. 4.1: two layers of 100 hidden units, initialised uniformly; +-0.1 is [18]'s."""
    model = Controller(5)
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert values.abs().max() <= 0.1 and abs(values.std() - 0.2 / math.sqrt(12)) < 1e-3
    assert model.lstm.num_layers == 2 and model.lstm.hidden_size == 100


def test_choices():
    """Sect. 3.2: each layer adds a location. Positions of one kind share their rows of the embedding; in
    another problem each position has rows of its own."""
    model, free = Controller(3), Controller(choices=[2, 6, 1, 3])
    assert model.choices == [5, 5, 12, 12, 6, 6, 6, 12, 12, 6, 7, 7, 12, 12, 6]
    assert model.rows.tolist() == [0, 0, 7, 7, 19] * 3 and model.start == 25      # 7 locations, 12, 6
    assert free.choices == [2, 6, 1, 3] and free.rows.tolist() == [0, 2, 8, 9] and free.start == 12
    assert model.embed.num_embeddings == 26 and free.embed.num_embeddings == 13


def test_log_prob_and_entropy_against_naive_cells():
    model = scaled(Controller(3, generator=generator(2)), 5)
    tokens, old = model.sample(3, generator())
    assert tokens.dtype == torch.int64 and not old.requires_grad
    tokens = torch.cat((tokens, model.random(3, generator())))
    log_prob, entropy = model.log_prob(tokens)
    torch.testing.assert_close(log_prob[:3].detach(), old, atol=1e-4, rtol=1e-6)  # what sample said
    for k, string in enumerate(tokens):
        expected = naive(model, string)
        assert log_prob[k].item() == pytest.approx(expected[0], rel=1e-4)
        assert entropy[k].item() == pytest.approx(expected[1], rel=1e-4)


def test_samples_follow_the_enumerated_probabilities():
    """One layer, 2 inputs, 3 operations, 2 aggregations: 2 * 2 * 3 * 3 * 2 = 72 strings in all."""
    model = scaled(Controller(1, 2, 3, 2, hidden=7, generator=generator(1)), 20)
    strings = torch.tensor(list(itertools.product(*map(range, model.choices))))
    with torch.no_grad():
        log_prob, entropy = model.log_prob(strings)
    p = log_prob.double().exp()
    assert len(strings) == 72 and p.sum().item() == pytest.approx(1, abs=1e-5)
    assert p.max() > 3 / 72  # far from uniform, or the test shows little
    # the chain rule: the mean of the summed conditional entropies is the entropy of the whole string
    assert (p * entropy).sum().item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-4)
    n, place = 20000, torch.tensor([36, 18, 6, 2, 1])     # of a string among the 72
    for tokens, q in ((model.sample(n, generator())[0], p), (model.random(n), torch.full_like(p, 1 / 72))):
        counts = torch.bincount((tokens * place).sum(1), minlength=72)
        assert ((counts - n * q).abs() <= 5 * (n * q * (1 - q)).sqrt() + 1).all()
    # an earlier token changes what follows: loc1 the aggregation, four tokens later
    p = p.reshape(model.choices)
    first = (p[..., 0] / p.sum(-1)).flatten(1)
    assert (first[0] - first[1]).abs().max() > 1e-3


# ---- PPO -----------------------------------------------------------------------------------------

def test_before_the_first_step_every_ratio_is_one():
    model = scaled(Controller(5), 3)
    tokens = model.random(6, generator())
    old, entropy = model.log_prob(tokens)                # with a graph; the update takes it as a constant
    ppo, entropy, reward = PPO(model, epochs=1, entropy_weight=0.5), entropy.mean().item(), torch.rand(6)
    figures = ppo.update(tokens, old, reward)
    assert abs(figures["approx_kl"]) < 1e-6 and figures["clip_fraction"] == 0
    # ratios of 1 leave the mean advantage, which is 0: the first baseline is the batch's mean
    assert figures["loss"] == pytest.approx(-0.5 * entropy, rel=1e-4)
    assert ppo.update(tokens, old, reward)["approx_kl"] > 1e-5            # the same sample, off-policy by now


def test_one_update_against_the_formulas():
    """Sect. 4.1's PPO maximises mean min(r A, clip(r, 1 - eps, 1 + eps) A) + w H. Every figure is written out
    from the naive log-probabilities; the old ones are off-policy."""
    model = Controller(2, generator=generator(1))
    tokens, old = model.sample(4, generator())
    # Ratios of 1.35 and 0.86, where better and worse than expected are clipped, and of 0.95 and 1.
    old = old + torch.tensor([-0.3, 0.15, 0.05, 0.0])
    ppo = PPO(model, epochs=1, clip=0.1, entropy_weight=0.01, baseline_decay=0.9)
    ppo.baseline = 0.5
    reward = [0.7, 0.2, 0.4, 0.9]
    advantage = [r - 0.5 for r in reward]
    std = math.sqrt(sum(a * a for a in advantage) / 4)
    surrogate = entropy = kl = outside = 0
    for k in range(4):
        log_prob, e = naive(model, tokens[k])
        r, a = math.exp(log_prob - old[k].item()), advantage[k] / std
        surrogate += min(r * a, min(max(r, 0.9), 1.1) * a) / 4
        entropy += e / 4
        kl += (r - 1 - math.log(r)) / 4
        outside += (abs(r - 1) > 0.1) / 4
    figures = ppo.update(tokens, old, reward)
    assert figures["loss"] == pytest.approx(-surrogate - 0.01 * entropy, abs=1e-4)
    assert figures["approx_kl"] == pytest.approx(kl, abs=1e-4)
    assert figures["clip_fraction"] == outside == 0.5
    assert figures["baseline"] == pytest.approx(0.5 + (1 - 0.9**4) * (sum(reward) / 4 - 0.5))


@pytest.mark.parametrize("ratio, better, pull", [
    (1.2, 1, 0), (0.8, -1, 0), (0.8, 1, 1), (1.2, -1, -1), (1.05, 1, 1), (0.95, -1, -1)])
def test_why_the_min(ratio, better, pull):
    """No gradient beyond the clip; on the other side of it the gradient brings the string back."""
    model = Controller(2, generator=generator(1))
    tokens = model.random(1, generator())
    old = model.log_prob(tokens)[0].detach()
    PPO(model, epochs=1, entropy_weight=0)._step(tokens, old - math.log(ratio), torch.tensor([float(better)]))
    change = (model.log_prob(tokens)[0].detach() - old).item()
    assert change == 0 if pull == 0 else change * pull > 1e-3


def advantage(ppo, *rewards, failed=None):
    failed = torch.tensor([False] * len(rewards) if failed is None else failed)
    return ppo._advantage(torch.tensor(rewards, dtype=torch.float64), failed)


def test_baseline_and_std():
    ppo = PPO(Controller(1), baseline_decay=0.9)
    assert advantage(ppo, 0.6).tolist() == [0]
    assert ppo.baseline == pytest.approx(0.6)
    # 0.8 less the baseline before it moves; the squares 0 and 0.04 weigh 0.09 and 0.1
    assert advantage(ppo, 0.8).item() == pytest.approx(0.2 / math.sqrt(0.04 * 0.1 / 0.19), rel=1e-4)
    assert ppo.baseline == pytest.approx(0.62)
    assert advantage(ppo, *torch.linspace(0, 1, 500)).std().item() == pytest.approx(1, abs=0.1)


def test_a_failed_sample_moves_neither_baseline_nor_std():
    """The others of its batch get what they would have got without it."""
    ppo, other = PPO(Controller(1)), PPO(Controller(1))
    assert advantage(ppo, 0.0, failed=[True]).tolist() == [-3] and ppo.baseline is None
    for better, worse in ((0.5, 0.6), (0.4, 0.8), (0.7, 0.5)):
        whole = advantage(ppo, better, 0.0, worse, failed=[False, True, False])
        assert whole[1] == -3 and torch.equal(whole[[0, 2]], advantage(other, better, worse))
        assert (ppo.baseline, ppo.square, ppo.weight) == (other.baseline, other.square, other.weight)


def test_replay_against_a_naive_loop():
    """[18]'s: the baseline moves first; then a step of its own for each of the last samples, its advantage
    taken anew. 30 samples, of which the last eight are kept. The seed draws the order. A failed sample leaves
    the baseline as it is."""
    model = Controller(2, generator=generator(1))
    naive_model, g, order = copy.deepcopy(model), generator(2), generator(5)
    ppo = PPO(model, learning_rate=1e-2, clip=0.1, epochs=1, entropy_weight=0, replay=8, seed=5)
    adam, baseline, past = torch.optim.Adam(naive_model.parameters(), lr=1e-2), None, []
    for number in range(30):
        tokens, old = model.sample(1, g)
        failed, reward = number % 7 == 6, torch.rand(1, generator=g).item() * (number % 7 != 6)
        figures = ppo.update(tokens, old, [reward], [failed])

        if not failed:
            baseline = reward if baseline is None else 0.95 * baseline + 0.05 * reward
        past = past[-7:] + [(tokens, old.item(), reward)]
        for k in torch.randperm(len(past), generator=order).tolist():
            string, old_log_prob, value = past[k]
            ratio = (naive_model.log_prob(string)[0][0] - old_log_prob).exp()
            better = value - baseline
            limit = 1.1 if better > 0 else 0.9           # beyond it there is nothing to gain
            inside = ratio < limit if better > 0 else ratio > limit
            adam.zero_grad()
            (-ratio * better if inside else 0 * ratio).backward()
            torch.nn.utils.clip_grad_norm_(naive_model.parameters(), 2.0)
            adam.step()
        assert figures["baseline"] == pytest.approx(baseline)
    for ours, expected in zip(model.parameters(), naive_model.parameters()):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert len(ppo.memory) == 8 and figures["clip_fraction"] > 0          # both sides of the clip were seen


@pytest.mark.parametrize("replay", [0, 10])
def test_a_saved_search_goes_on_exactly(replay):
    def update(ppo, seed):
        tokens, old = ppo.controller.sample(4, generator(seed))
        ppo.update(tokens, old, tokens.double().mean(1) / 10)

    ppo, again = (PPO(Controller(2), replay=replay, seed=seed) for seed in (3, 0))
    update(ppo, 1)
    torch.save(ppo.state_dict(), file := io.BytesIO())
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    for seed in (2, 3):
        update(ppo, seed)
        update(again, seed)
    torch.testing.assert_close(again.state_dict(), ppo.state_dict(), rtol=0, atol=0)


# ---- Early stop ----------------------------------------------------------------------------------

def goes_on(rule, scores, draws):
    """Whether each of these scores, one after the other, goes on."""
    early_stop, decisions = EarlyStop(rule, 0.9), []
    for score, draw in zip(scores, draws):
        decisions.append(early_stop.promising(score, draw))
        assert early_stop.promising(score, draw) == decisions[-1]         # asking changes nothing
        early_stop.move(score)
    return decisions


def as_in_18(scores, draws):
    """[18]'s rule, step by step. A check sees all checks before it, as where a round has one candidate."""
    value, delta, counter, factors = 0.01, 0.9, 0, {100: 0.9, 200: 0.8, 300: 0.7, 400: 0.6}
    decisions = []
    for score, draw in zip(scores, draws):
        delta *= factors.get(counter, 1)                 # exactly: the counter may jump over it
        counter += 1
        value = 0.99 * value + 0.01 * score              # it moves before the comparison
        if score > value:
            counter += 1
            decisions.append(True)
        else:
            decisions.append(score > value * (1 - delta * draw))
    return decisions


def test_the_early_stop_as_in_18_against_a_naive_replay():
    for seed in range(60):
        rng = random.Random(seed)
        centre, spread = rng.random(), rng.choice((0.01, 0.1, 0.5))
        scores = [max(0.0, rng.gauss(centre, spread)) for _ in range(rng.choice((20, 500)))]
        draws = [rng.random() for _ in scores]
        assert goes_on("as-in-18", scores, draws) == as_in_18(scores, draws)


@pytest.mark.parametrize("rule, least, most", [("as-in-18", 20, 80), ("average", 440, 560)])
def test_how_many_of_a_thousand_candidates_are_stopped(rule, least, most):
    """Of rewards that are drawn alike. [18]'s rule stops none of the first hundred."""
    for seed in range(5):
        rng = random.Random(seed)
        scores, draws = zip(*((rng.gauss(0.55, 0.03), rng.random()) for _ in range(1000)))
        decisions = goes_on(rule, scores, draws)
        assert least <= decisions.count(False) <= most
        assert all(decisions[:100]) == (rule == "as-in-18")


# ---- A search whose answer is known --------------------------------------------------------------

def test_ppo_beats_random_search_on_a_planted_genotype(monkeypatch, capsys):
    """The mean reward of random strings is 1 - 0.46 times the mean share of wrong tokens. `python
    controller.py` prints both curves."""
    found, uniform, entropy = searched = controller.search(seed=0, samples=300, rollout=10)
    assert found.shape == uniform.shape == (300,) and entropy.shape == (30,)
    wrong = sum(1 - 1 / n for n in Controller(5).choices) / 25
    assert uniform.mean().item() == pytest.approx(1 - 0.46 * wrong, abs=0.01)
    assert found[-50:].mean() > 0.73                      # the noise of one seed's mean is 0.02
    assert found.max() > uniform.max() + 0.07                             # the best of 300 samples each
    assert entropy[-1] < 40 < 50 < entropy[0]
    best, reward = controller.planted_reward(Controller(5))
    assert reward(best.expand(2000, -1), generator()).std().item() == pytest.approx(0.03, rel=0.1)     # noise
    monkeypatch.setattr(controller, "search", lambda *arguments: searched)
    controller.main(["--seeds", "2"])
    figures = [f"{x:9.3f}" for x in (found[-50:].mean(), uniform[-50:].mean(), found.max(), uniform.max())]
    assert " ".join([f"{300:7}", *figures, f"{entropy[-1]:9.1f}"]) in capsys.readouterr().out


# ---- What is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize("make", [
    lambda: Controller(0), lambda: Controller(choices=[3, 0]), Controller, lambda: Controller(1, choices=[3]),
    lambda: PPO(Controller(2), learning_rate=math.nan), lambda: PPO(Controller(2), baseline_decay=1),
    lambda: Controller(2).sample(0), lambda: Controller(2).random(0)])
def test_sizes_and_settings_are_refused(make):
    with pytest.raises(ValueError):
        make()


def test_misshapen_tokens_and_those_out_of_range_are_refused():
    model, one = Controller(2), torch.eye(10, dtype=torch.int64)
    good = torch.tensor([model.choices]) - 1              # the last choice of each position
    assert model.log_prob(good)[0] < 0
    for bad in (good[0], good[:, :-1], good[:0], good.float(), good > 0, *(good + one)[:, None], -one):
        with pytest.raises(ValueError, match="token"):
            model.log_prob(bad)


def test_bad_updates_are_refused_and_change_nothing():
    model = Controller(2)
    ppo, (tokens, old), reward = PPO(model), model.sample(3, generator()), torch.tensor([.1, .2, .3])
    ppo.update(tokens, old, reward)
    before = copy.deepcopy(ppo.state_dict())
    for bad in ((tokens, old[:, None], reward), (tokens, old, reward[:, None]), (tokens + 12, old, reward),
                (tokens, old, reward * math.nan), (tokens, old * math.inf, reward),
                (tokens, old, reward, [[False]] * 3), (tokens, old, reward, [0, 1, 0])):
        with pytest.raises(ValueError):
            ppo.update(*bad)
    torch.testing.assert_close(ppo.state_dict(), before, rtol=0, atol=0)
