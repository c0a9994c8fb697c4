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
from controller import PPO, Controller, EarlyStop, planted_reward


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scaled(model, factor):
    """The same controller with larger parameters, so that what it samples now sways what it samples next."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def tiny(factor=20):
    """One layer, 2 inputs, 3 operations, 2 aggregations: 2 * 2 * 3 * 3 * 2 = 72 strings in all."""
    model = Controller(1, 2, num_operations=3, num_aggregations=2, hidden=7, generator=generator(1))
    return scaled(model, factor), torch.tensor(list(itertools.product(*map(range, model.choices))))


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


# --------------------------------------------------------------------------------------------------
# The policy

def test_parameters_start_uniform():
    model = Controller(5)
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert values.abs().max() <= 0.1 and abs(values.mean()) < 1e-3
    assert abs(values.std() - 0.2 / math.sqrt(12)) < 1e-3
    assert model.lstm.num_layers == 2 and model.lstm.hidden_size == 100
    assert all(p.abs().max() > 0.09 for p in model.parameters() if p.numel() > 300)  # biases too


def test_choices():
    """Each layer adds a location; positions of one kind share their rows of the embedding."""
    model = Controller(3)
    assert model.choices == [5, 5, 12, 12, 6, 6, 6, 12, 12, 6, 7, 7, 12, 12, 6]
    assert model.rows.tolist() == [0, 0, 7, 7, 19] * 3 and model.start == 25      # 7 locations, 12, 6
    assert model.embed.num_embeddings == 26


def test_free_choices():
    """Another problem: each position has its own number of tokens and its own rows of the embedding."""
    model = Controller(choices=[2, 6, 1, 3])
    assert model.choices == [2, 6, 1, 3] and model.rows.tolist() == [0, 2, 8, 9] and model.start == 12
    strings = torch.tensor(list(itertools.product(*map(range, model.choices))))
    assert scaled(model, 10).log_prob(strings)[0].exp().sum().item() == pytest.approx(1, abs=1e-5)
    for draw in (model.sample(500, generator())[0], model.random(500, generator())):
        assert draw.shape == (500, 4) and (draw.amax(0) < torch.tensor(model.choices)).all()


def test_sampled_log_probs_are_the_evaluated_ones():
    model = scaled(Controller(5), 5)
    tokens, old = model.sample(7, generator())
    assert tokens.shape == (7, 25) and tokens.dtype == torch.int64
    assert old.shape == (7,) and not old.requires_grad
    new, entropy = model.log_prob(tokens)
    assert new.shape == entropy.shape == (7,) and new.requires_grad and entropy.requires_grad
    torch.testing.assert_close(new.detach(), old, atol=1e-4, rtol=1e-6)
    alone = torch.cat([model.log_prob(row[None])[0] for row in tokens])  # a row doesn't depend on its batch
    torch.testing.assert_close(alone, new, atol=1e-4, rtol=1e-6)


def test_log_prob_and_entropy_against_naive_cells():
    model = scaled(Controller(3, generator=generator(2)), 5)
    tokens = torch.cat((model.sample(3, generator())[0], model.random(3, generator())))
    log_prob, entropy = model.log_prob(tokens)
    for k, string in enumerate(tokens):
        expected = naive(model, string)
        assert log_prob[k].item() == pytest.approx(expected[0], rel=1e-4)
        assert entropy[k].item() == pytest.approx(expected[1], rel=1e-4)


def test_samples_follow_the_enumerated_probabilities():
    model, strings = tiny()
    with torch.no_grad():
        log_prob, entropy = model.log_prob(strings)
    p = log_prob.double().exp()
    assert len(strings) == 72 and p.sum().item() == pytest.approx(1, abs=1e-5)
    assert p.max() > 3 / 72  # far from uniform, or the test shows little
    # the chain rule: the mean of the summed conditional entropies is the entropy of the whole string
    assert (p * entropy).sum().item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-4)
    n, counts = 20000, torch.zeros(2, 2, 3, 3, 2, dtype=torch.float64)
    tokens, _ = model.sample(n, generator())
    counts.index_put_(tuple(tokens.T), torch.ones(n, dtype=torch.float64), accumulate=True)
    assert ((counts.flatten() - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1).all()
    # an earlier token changes what follows: loc1 the aggregation, four tokens later
    p = p.reshape(counts.shape)
    first = (p[..., 0] / p.sum(-1)).flatten(1)
    assert (first[0] - first[1]).abs().max() > 1e-3


def test_samples_and_random_stay_within_the_choices_and_reach_them_all():
    model = Controller(4)
    for tokens in (model.sample(3000, generator())[0], model.random(3000, generator())):
        assert tokens.shape == (3000, 20) and tokens.dtype == torch.int64 and tokens.min() == 0
        assert tokens.amax(0).tolist() == [n - 1 for n in model.choices]
        for t, n in enumerate(model.choices):
            assert torch.bincount(tokens[:, t], minlength=n).min() > 0.5 * 3000 / n  # about uniform


def test_a_seed_gives_the_same_tokens():
    model = Controller(5)
    for draw in (lambda g: model.sample(6, g)[0], lambda g: model.random(6, g)):
        torch.manual_seed(1)
        first = draw(generator(3))
        torch.manual_seed(2)
        before = torch.get_rng_state()
        assert torch.equal(first, draw(generator(3)))
        assert torch.equal(before, torch.get_rng_state())  # torch's own generator isn't touched
        assert not torch.equal(first, draw(generator(4)))
    a, b = (Controller(2, generator=generator(5)).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------------------
# PPO

KEYS = {"loss", "approx_kl", "clip_fraction", "entropy", "baseline", "grad_norm"}


def test_before_the_first_step_every_ratio_is_one():
    model = scaled(Controller(5), 3)
    ppo = PPO(model, epochs=1, entropy_weight=0.5)
    tokens, old = model.sample(6, generator())
    entropy = model.log_prob(tokens)[1].mean().item()
    reward = torch.tensor([.1, .9, .4, .5, .2, .8])
    figures = ppo.update(tokens, old, reward)
    assert figures.keys() == KEYS and all(type(value) is float for value in figures.values())
    assert abs(figures["approx_kl"]) < 1e-6 and figures["clip_fraction"] == 0
    assert figures["entropy"] == pytest.approx(entropy, rel=1e-5)
    # ratios of 1 leave the mean advantage, and the first baseline is the batch's mean
    assert figures["loss"] == pytest.approx(-0.5 * entropy, rel=1e-4)
    assert figures["baseline"] == pytest.approx(reward.mean().item())
    assert figures["grad_norm"] > 0
    again = ppo.update(tokens, old, reward)  # the same sample is off-policy by now
    assert again["approx_kl"] > 1e-5


def test_one_update_against_the_formulas():
    """Off-policy old log-probs; every figure written out from the naive log-probabilities."""
    model = Controller(2, generator=generator(1))
    tokens, old = model.sample(4, generator())
    # Ratios of 1.35 and 0.74, where better and worse than expected are clipped, and of 0.95 and 1.
    old = old + torch.tensor([-0.3, 0.3, 0.05, 0.0])
    ppo = PPO(model, epochs=1, clip=0.1, entropy_weight=0.01, baseline_decay=0.9)
    ppo.baseline = 0.5
    reward = [0.7, 0.2, 0.4, 0.9]
    advantage = [r - 0.5 for r in reward]
    deviation = math.sqrt(sum(a * a for a in advantage) / 4)
    surrogate = entropy = kl = outside = 0
    for k in range(4):
        log_prob, e = naive(model, tokens[k])
        r, a = math.exp(log_prob - old[k].item()), advantage[k] / deviation
        surrogate += min(r * a, min(max(r, 0.9), 1.1) * a) / 4
        entropy += e / 4
        kl += (r - 1 - math.log(r)) / 4
        outside += (abs(r - 1) > 0.1) / 4
    figures = ppo.update(tokens, old, reward)
    assert figures["loss"] == pytest.approx(-surrogate - 0.01 * entropy, abs=1e-4)
    assert figures["approx_kl"] == pytest.approx(kl, abs=1e-4)
    assert figures["clip_fraction"] == outside == 0.5
    assert figures["baseline"] == pytest.approx(0.5 + (1 - 0.9**4) * (sum(reward) / 4 - 0.5))


def advantage(ppo, *rewards, failed=None):
    failed = [False] * len(rewards) if failed is None else failed
    return ppo._advantage(torch.tensor(rewards, dtype=torch.float64), torch.tensor(failed))


def test_baseline_and_deviation():
    ppo = PPO(Controller(1), baseline_decay=0.9)
    assert advantage(ppo, 0.6).tolist() == [0]
    assert ppo.baseline == pytest.approx(0.6)
    # 0.8 less the baseline before it moves; the squares 0 and 0.04 weigh 0.09 and 0.1
    assert advantage(ppo, 0.8).item() == pytest.approx(0.2 / math.sqrt(0.04 * 0.1 / 0.19), rel=1e-4)
    assert ppo.baseline == pytest.approx(0.62)
    assert advantage(ppo, *torch.linspace(0, 1, 500)).std().item() == pytest.approx(1, abs=0.1)


def test_a_failed_sample_moves_neither_baseline_nor_deviation():
    """The others of its batch get what they would have got without it."""
    ppo, other = PPO(Controller(1)), PPO(Controller(1))
    assert advantage(ppo, 0.0, failed=[True]).tolist() == [-3] and ppo.baseline is None
    for rewards in ((0.5, 0.6), (0.4, 0.8), (0.7, 0.5)):
        whole = advantage(ppo, rewards[0], 0.0, rewards[1], failed=[False, True, False])
        assert whole[1] == -3 and torch.equal(whole[[0, 2]], advantage(other, *rewards))
        assert (ppo.baseline, ppo.square, ppo.weight) == (other.baseline, other.square, other.weight)


@pytest.mark.parametrize("replay", [0, 100])
def test_updates_keep_a_failed_sample_out_of_the_baseline_and_make_it_less_likely(replay):
    """And where none failed, all is as if nothing had been said of it."""
    models = [Controller(2, generator=generator(1)) for _ in range(2)]
    ppo, other = (PPO(model, replay=replay) for model in models)
    for seed in range(3):
        tokens, old = models[0].sample(4, generator(seed))
        figures = ppo.update(tokens, old, [0.5, 0.4, 0.6, 0.7], [False] * 4)
        assert figures == other.update(tokens, old, [0.5, 0.4, 0.6, 0.7])
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    before = ppo.baseline
    tokens, old = models[0].sample(1, generator(5))
    assert ppo.update(tokens, old, [0.0], [True])["baseline"] == before
    assert models[0].log_prob(tokens)[0] < old


def test_replay_against_a_naive_loop():
    """[18]'s: the baseline moves first; then a step of its own for each of the last samples, its advantage
    taken anew. 30 samples, of which the last eight are kept."""
    model = Controller(2, generator=generator(1))
    naive_model, g = copy.deepcopy(model), generator(2)
    ppo = PPO(model, learning_rate=1e-2, clip=0.1, epochs=1, entropy_weight=0, replay=8)
    adam, baseline, past = torch.optim.Adam(naive_model.parameters(), lr=1e-2), None, []
    for update in range(1, 31):
        tokens, old = model.sample(1, g)
        reward = torch.rand(1, generator=g).item()
        figures = ppo.update(tokens, old, [reward])

        baseline = reward if baseline is None else 0.95 * baseline + 0.05 * reward
        past = past[-7:] + [(tokens, old.item(), reward)]
        for k in torch.randperm(len(past), generator=generator(update)).tolist():
            string, old_log_prob, value = past[k]
            ratio = (naive_model.log_prob(string)[0][0] - old_log_prob).exp()
            better = value - baseline
            limit = 1.1 if better > 0 else 0.9           # beyond it there is nothing to gain
            inside = ratio < limit if better > 0 else ratio > limit
            adam.zero_grad()
            (-ratio * better if inside else 0 * ratio).backward()
            torch.nn.utils.clip_grad_norm_(naive_model.parameters(), 2.0)
            adam.step()
        assert figures["baseline"] == pytest.approx(baseline) and figures.keys() == KEYS
    for ours, expected in zip(model.parameters(), naive_model.parameters()):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert len(ppo.memory) == 8 and figures["clip_fraction"] > 0          # both sides of the clip were seen


def test_the_old_log_prob_is_a_constant():
    """Also when it comes with a graph; otherwise the ratio would have no gradient."""
    after = []
    for old in (lambda log_prob: log_prob, torch.Tensor.detach):
        model = Controller(2, generator=generator(1))
        tokens = model.random(3, generator())
        figures = PPO(model).update(tokens, old(model.log_prob(tokens)[0]), [0.1, 0.5, 0.9])
        after.append((figures, [p.detach() for p in model.parameters()]))
    assert after[0][0] == after[1][0] and all(map(torch.equal, after[0][1], after[1][1]))


def test_it_moves_toward_the_rewarded_string():
    for seed in range(3):
        model = Controller(3, generator=generator(seed))
        tokens = model.random(2, generator(seed))
        old = model.log_prob(tokens)[0].detach()
        PPO(model, epochs=1, entropy_weight=0).update(tokens, old, [1.0, 0.0])
        change = model.log_prob(tokens)[0].detach() - old
        assert change[0] > 0 > change[1]
    same = [p.detach().clone() for p in model.parameters()]
    old = model.log_prob(tokens)[0].detach()
    PPO(model, epochs=3, entropy_weight=0).update(tokens, old, [0.3, 0.3])        # equal ones teach nothing
    assert all(torch.equal(a, b) for a, b in zip(same, model.parameters()))


@pytest.mark.parametrize("n", [1, 5])
def test_updates_of_any_size_stay_finite(n):
    model = Controller(2)
    ppo, g = PPO(model), generator()
    for reward in (torch.full((n,), 0.4), torch.rand(n, generator=g), torch.zeros(n), torch.ones(n)):
        tokens, old = model.sample(n, g)
        figures = ppo.update(tokens, old, reward)
        assert all(math.isfinite(value) for value in figures.values())
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("replay", [0, 10])
def test_a_saved_search_goes_on_exactly(replay):
    def start():
        model = Controller(2, generator=generator(1))
        return model, PPO(model, replay=replay)

    def search(model, ppo, g, updates):
        for _ in range(updates):
            tokens, old = model.sample(4, g)
            ppo.update(tokens, old, tokens.double().mean(1) / 10)
        return tokens

    model, ppo = start()
    expected = search(model, ppo, generator(7), 6)
    model, ppo = start()
    g = generator(7)
    search(model, ppo, g, 3)
    file = io.BytesIO()
    torch.save({"ppo": ppo.state_dict(), "generator": g.get_state()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = Controller(2)
    ppo, g = PPO(model, replay=replay), torch.Generator()
    ppo.load_state_dict(saved["ppo"])
    g.set_state(saved["generator"])
    assert torch.equal(search(model, ppo, g, 3), expected)
    with pytest.raises(RuntimeError):
        PPO(Controller(3)).load_state_dict(saved["ppo"])


# --------------------------------------------------------------------------------------------------
# Early stop

def goes_on(rule, scores, draws):
    """Whether each of these scores, one after the other, goes on."""
    early_stop, answers = EarlyStop(rule, 0.9), []
    for score, draw in zip(scores, draws):
        answers.append(early_stop.promising(score, draw))
        early_stop.move(score)
    return answers


def as_in_18(scores, draws):
    """The words of [18]'s rule, one after the other."""
    value, delta, counter, thresholds = 0.01, 0.9, 0, [(100, 0.9), (200, 0.8), (300, 0.7), (400, 0.6)]
    for score, draw in zip(scores, draws):
        counter += 1
        value = 0.99 * value + 0.01 * score
        if score > value:
            counter += 1
            yield True
        else:
            yield score > value * (1 - delta * draw)
        if thresholds and counter > thresholds[0][0]:
            delta *= thresholds.pop(0)[1]


def test_the_early_stop_as_in_18_against_a_naive_loop():
    stopped = 0
    for seed in range(60):
        rng = random.Random(seed)
        centre, spread = rng.random(), rng.choice((0.01, 0.1, 0.5))
        scores = [max(0.0, rng.gauss(centre, spread)) for _ in range(rng.choice((20, 500)))]
        draws = [rng.random() for _ in scores]
        answers = goes_on("as-in-18", scores, draws)
        assert answers == list(as_in_18(scores, draws))
        stopped += answers.count(False)
    assert stopped > 200


@pytest.mark.parametrize("rule, least, most", [("as-in-18", 20, 80), ("average", 440, 560)])
def test_how_many_of_a_thousand_candidates_are_stopped(rule, least, most):
    """Of rewards that are drawn alike. [18]'s rule stops none of the first hundred."""
    for seed in range(5):
        rng = random.Random(seed)
        scores, draws = zip(*((rng.gauss(0.55, 0.03), rng.random()) for _ in range(1000)))
        answers = goes_on(rule, scores, draws)
        assert least <= answers.count(False) <= most
        assert all(answers[:100]) == (rule == "as-in-18")


# --------------------------------------------------------------------------------------------------
# A search whose answer is known

def test_planted_reward():
    model = Controller(5)
    best, reward = planted_reward(model, seed=3)
    other = (best + 1) % torch.tensor(model.choices)
    half = torch.where(torch.arange(25) < 10, other, best)
    values = reward(torch.stack((best, other, half)))
    assert values.tolist() == pytest.approx([1, 0.54, 0.54 + 0.46 * 0.6]) and values[0] == 1
    noisy = reward(best.expand(2000, -1), generator())
    assert abs(noisy.mean() - 1) < 0.003 and abs(noisy.std() - 0.03) < 0.003
    uniform = reward(model.random(2000, generator()))
    assert abs(uniform.mean() - 0.60) < 0.01 and uniform.max() < 0.76


@pytest.fixture(scope="module")
def searched():
    return controller.search(seed=0, samples=300, rollout=10)


def test_ppo_beats_random_search_on_a_planted_genotype(searched):
    found, uniform, entropy = searched
    assert found.shape == uniform.shape == (300,) and entropy.shape == (30,)
    assert found[-50:].mean() > 0.73 > 0.62 > uniform.mean()  # the noise of one seed's mean is 0.02
    assert found.max() > uniform.max() + 0.07                             # the best of 300 samples each
    assert entropy[-1] < 40 < 50 < entropy[0]


def test_ppo_solves_another_problem():
    g = generator()
    model = Controller(choices=[6] * 8, generator=g)
    ppo, (best, reward) = PPO(model), planted_reward(model)
    assert best.shape == (8,) and reward(best[None]).item() == 1
    for _ in range(40):
        tokens, old = model.sample(10, g)
        ppo.update(tokens, old, reward(tokens, g))
    assert reward(model.sample(100, g)[0]).mean() > 0.8                   # 0.62 at the start


def test_main_prints_both_curves(searched, monkeypatch, capsys):
    """And leaves the process's threads as they are."""
    threads, asked = torch.get_num_threads(), []
    monkeypatch.setattr(controller, "search", lambda *arguments: asked.append(arguments) or searched)
    torch.set_num_threads(threads + 1)
    controller.main(["--seeds", "2"])
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    assert asked == [(0, 300, 10), (1, 300, 10)]
    found, uniform, entropy = searched
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for k in (50, 300):
        figures = [found[k - 50:k].mean(), uniform[k - 50:k].mean(), found[:k].max(), uniform[:k].max()]
        expected = [*(f"{x:.3f}" for x in figures), f"{entropy[k // 10 - 1]:.1f}"]
        assert [str(k), *expected] in rows
    for option in ("--samples", "--rollout", "--seeds"):
        with pytest.raises(SystemExit):
            controller.main([option, "0"])


# --------------------------------------------------------------------------------------------------
# What is refused

@pytest.mark.parametrize("sizes", [
    dict(num_layers=0), dict(num_layers=1, num_inputs=0), dict(num_layers=1, num_operations=0),
    dict(num_layers=1, num_aggregations=0), dict(num_layers=1, hidden=0), dict(choices=[]),
    dict(choices=[3, 0]), dict(choices=[3], hidden=0), dict(), dict(num_layers=1, choices=[3])], ids=str)
def test_sizes_are_refused(sizes):
    with pytest.raises(ValueError):
        Controller(**sizes)


def test_misshapen_tokens_and_those_out_of_range_are_refused():
    model = Controller(2)
    good = model.random(3, generator())
    for bad in (good[0], good[:, :-1], good[None], good[:0], good.float(), good > 0):
        with pytest.raises(ValueError, match="tokens must be"):
            model.log_prob(bad)
    for t, n in enumerate(model.choices):
        for value in (-1, n, 2**40):
            tokens = good.clone()
            tokens[1, t] = value
            message = f"token {t} of string 1 must be from 0 to {n - 1}, got {value}"
            with pytest.raises(ValueError, match=message):
                model.log_prob(tokens)
    for draw in (model.sample, model.random):
        with pytest.raises(ValueError):
            draw(0)


def test_bad_updates_are_refused_and_change_nothing():
    model = Controller(2)
    ppo = PPO(model)
    tokens, old = model.sample(3, generator())
    reward = torch.tensor([.1, .2, .3])
    ppo.update(tokens, old, reward)
    states = [io.BytesIO(), io.BytesIO()]
    torch.save(ppo.state_dict(), states[0])
    for bad in ((tokens, old[:, None], reward), (tokens, old, reward[:, None]), (tokens, old[:2], reward),
                (tokens[0], old, reward), (tokens, old, reward[:1]), (tokens, old.sum(), reward),
                (tokens, old, reward * math.nan), (tokens, old * math.inf, reward),
                (tokens + 12, old, reward), (tokens[:0], old[:0], reward[:0])):
        with pytest.raises(ValueError):
            ppo.update(*bad)
    torch.save(ppo.state_dict(), states[1])
    assert states[0].getvalue() == states[1].getvalue()
    for setting in (dict(learning_rate=0), dict(learning_rate=math.nan), dict(clip=0), dict(baseline_decay=1),
                    dict(epochs=0), dict(entropy_weight=-1), dict(max_grad_norm=0), dict(replay=-1)):
        with pytest.raises(ValueError):
            PPO(model, **setting)
