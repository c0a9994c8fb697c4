"""The controller, an LSTM that writes genotypes token by token; PPO, which trains it; and the early stop.

Sect. 3.2: a genotype of L layers is a string of 5L tokens, five per layer: (loc1, loc2, op1, op2, agg).
Sect. 3.3: sample a string, train and score its cell, and let the reward train the controller.
Sect. 4.1: the LSTM's size, PPO and its rate, L, and the early stop of un-promising cells.

[18] is the search for static networks from which the paper takes its controller. What neither of the two
fixes is marked "[ours]". The controller is small and stays on the CPU, whatever device trains the cells.

    python controller.py       PPO seeks a planted genotype, beside random search, within twenty seconds
"""
import argparse
import itertools
import math
import time

import torch
from torch import nn


# ---- The policy ----------------------------------------------------------------------------------

class Controller(nn.Module):
    """Two-layer LSTM with 100 hidden units, initialised uniformly (Sect. 4.1), within +-0.1 [18].

    It is a policy over strings: pi(string) = product over t of p(token t | tokens 0 .. t - 1).

    Controller(num_layers) writes genotypes; L is 5 on CamVid and 4 on CityScapes (Sect. 4.1). Operations and
    aggregations are only numbers here: token 3 is the fourth entry of Table 1 or 2. Other discrete problems
    give `choices`, the number of tokens to choose from at each position: Controller(choices=[6] * 10) writes
    strings of 10 tokens from 0 to 5. `generator` draws the initial parameters (None: torch's global one).
    Raises ValueError when a size is below 1, or when not exactly one of num_layers and choices is given."""

    def __init__(self, num_layers=None, num_inputs=5, num_operations=12, num_aggregations=6, hidden=100,
                 generator=None, choices=None):
        super().__init__()
        if (num_layers is None) == (choices is None):
            raise ValueError("give either num_layers or choices")
        if choices is None:
            sizes = num_layers, num_inputs, num_operations, num_aggregations
            choices, rows, count = genotype_positions(*sizes)
        else:
            sizes = choices = list(choices)
            *rows, count = itertools.accumulate(choices, initial=0)   # [2, 6, 3] -> rows 0, 2, 8; count 11
        if not choices or min(*sizes, hidden) < 1:
            raise ValueError(f"every size must be at least 1, got {list(sizes)} and {hidden} hidden units")
        self.choices = choices                            # number of tokens to choose from at each position
        self.rows = torch.tensor(rows)                    # (5L,) embedding row of each position's token 0
        self.start = count                                # one more row, the first input; learned [18]
        self.embed = nn.Embedding(count + 1, hidden)
        self.lstm = nn.LSTM(hidden, hidden, num_layers=2, batch_first=True)
        # [ours] One output head per position; [18] has a single one for all operations. It matters
        # (docs/ppo.md): the LSTM starts with such small weights that its state hardly depends on the layer.
        self.heads = nn.ModuleList(nn.Linear(hidden, n) for n in choices)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-0.1, 0.1, generator=generator)

    @torch.no_grad()
    def sample(self, n, generator=None):
        """Samples n strings -> tokens (n, 5L) int64 and their log_prob (n,), detached, for PPO.update.
        generator draws them (None: torch's global one). Raises ValueError when n is below 1."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        row, state = torch.full((n, 1), self.start), None
        tokens, log_prob = [], torch.zeros(n)
        for head, first in zip(self.heads, self.rows):
            hidden, state = self.lstm(self.embed(row), state)         # (n, 1) -> (n, 1, hidden)
            scores = head(hidden[:, 0]).log_softmax(dim=1)            # (n, choices)
            token = torch.multinomial(scores.exp(), 1, generator=generator)     # (n, 1)
            tokens.append(token)
            log_prob += scores.gather(1, token)[:, 0]
            # [ours] The sampled token is the next input. [18]'s code feeds the LSTM its own output instead.
            # That LSTM never sees what was sampled, so its tokens are independent of each other.
            row = first + token
        return torch.cat(tokens, dim=1), log_prob

    def random(self, n, generator=None):
        """Random search: n strings of uniform tokens, (n, 5L) int64. Raises ValueError when n is below 1."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        share = torch.rand(n, len(self.choices), generator=generator)           # in [0, 1)
        return (share * torch.tensor(self.choices)).long()  # below choices: no product rounds up to it

    def log_prob(self, tokens):
        """tokens (n, 5L) -> log_prob (n,), entropy (n,), in nats and differentiable.

        One pass over the given strings (teacher forcing). A string's entropy is the sum over its positions of
        the entropy of the next token, given those before it. Its mean over sampled strings estimates the
        policy's. Raises ValueError when the shape is wrong or a token isn't one of its position's choices."""
        tokens = self._check_tokens(tokens)
        start = torch.full((len(tokens), 1), self.start)
        rows = torch.cat((start, (self.rows + tokens)[:, :-1]), dim=1)  # (n, 5L) input t is token t - 1
        hidden, _ = self.lstm(self.embed(rows))                       # (n, 5L, hidden)
        log_prob, entropy = 0, 0
        for head, h, token in zip(self.heads, hidden.unbind(1), tokens.unbind(1)):
            scores = head(h).log_softmax(dim=1)                       # (n, choices)
            log_prob = log_prob + scores.gather(1, token[:, None])[:, 0]        # (n,)
            entropy = entropy - (scores.exp() * scores).sum(dim=1)
        return log_prob, entropy

    def _check_tokens(self, tokens):
        tokens, length = torch.as_tensor(tokens), len(self.choices)
        if tokens.dim() != 2 or len(tokens) < 1 or tokens.shape[1] != length:
            raise ValueError(f"tokens must be (n, {length}) with n at least 1, got {tuple(tokens.shape)}")
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ValueError(f"tokens must be whole numbers, got {tokens.dtype}")
        tokens = tokens.long()
        wrong = ((tokens < 0) | (tokens >= torch.tensor(self.choices))).nonzero()
        if len(wrong):
            i, t = wrong[0].tolist()
            last, value = self.choices[t] - 1, tokens[i, t]
            raise ValueError(f"token {t} of string {i} must be from 0 to {last}, got {value}")
        return tokens


def genotype_positions(num_layers, num_inputs, num_operations, num_aggregations):
    """The positions of a genotype (Sect. 3.2) -> the number of tokens to choose from at each (5L ints), the
    embedding row of each position's token 0 (5L ints), and the number of rows.

    Layer k has num_inputs + k locations: the inputs and the results of the layers before it. The rows: first
    the locations (loc1 and loc2 share them), then the operations (op1 and op2), then the aggregations."""
    operations = num_inputs + num_layers - 1              # row of operation 0
    aggregations = operations + num_operations            # row of aggregation 0
    choices, rows = [], []
    for k in range(num_layers):
        choices += [num_inputs + k, num_inputs + k, num_operations, num_operations, num_aggregations]
        rows += [0, 0, operations, operations, aggregations]
    return choices, rows, aggregations + num_aggregations


# ---- PPO -----------------------------------------------------------------------------------------

class PPO:
    """Sect. 4.1: proximal policy optimisation (Schulman et al., 2017) of a Controller, by Adam.

    A whole string is one action, as in [18]. Its ratio r = pi / pi_old says how much likelier the string is
    now than when it was sampled; its advantage A says how much better than expected its reward was. PPO
    maximises  mean min(r A, clip(r, 1 - eps, 1 + eps) A) + w H,  where H is the policy's entropy.

    clip, baseline_decay and max_grad_norm are [18]'s, the other defaults [ours]. [18]'s code, at the paper's
    rate of 1e-4 (Sect. 4.1), is replay=100, learning_rate=1e-4, epochs=1, entropy_weight=0 with one sample
    per update: each takes one step on each of the last 100 samples, in an order that `seed` draws. With four
    samples per update the defaults take a hundredth of those steps. docs/ppo.md measures both on
    `planted_reward` ("Which settings?": for your own problem). Raises ValueError if one is out of range."""

    def __init__(self, controller, learning_rate=3e-3, clip=0.1, baseline_decay=0.95, epochs=4,
                 entropy_weight=1e-3, max_grad_norm=2.0, replay=0, seed=0):
        if not (learning_rate > 0 and 0 < clip < 1 and 0 <= baseline_decay < 1 and epochs >= 1
                and entropy_weight >= 0 and max_grad_norm > 0 and replay >= 0):
            raise ValueError(f"out of range: learning_rate {learning_rate}, clip {clip}, epochs {epochs}, "
                             f"baseline_decay {baseline_decay}, entropy_weight {entropy_weight}, "
                             f"max_grad_norm {max_grad_norm} or replay {replay}")
        self.controller = controller
        self.clip, self.baseline_decay, self.epochs = clip, baseline_decay, epochs
        self.entropy_weight, self.max_grad_norm, self.replay = entropy_weight, max_grad_norm, replay
        self.optimizer = torch.optim.Adam(controller.parameters(), lr=learning_rate)
        self.baseline = None                 # running mean of the reward; starts at the first batch's mean
        self.square, self.weight = 0.0, 0.0  # running sum of (reward - baseline)^2, and of its weights
        self.memory = []                     # with replay: tokens, old_log_prob, reward of each sample
        self.order = torch.Generator().manual_seed(seed)      # with replay: in which order they are taken

    def _advantage(self, reward, failed):
        """reward (n,) -> A (n,) = (reward - baseline) / std, and moves both. [ours] except for the decay.

        A failed sample was not measured. It moves neither of the two, and its A is -3: three std below the
        expected, like the worst of some hundreds of cells. Its reward of 0 is further below, by ten std or
        more, and a single failure would outweigh its whole batch."""
        A = torch.full_like(reward, -3.0)
        measured = reward[~failed]
        if len(measured):
            if self.baseline is None:
                self.baseline = float(measured.mean())
            above = measured - self.baseline              # the baseline of the batches before
            # The decay is per sample, as in [18], where an update has one sample. A batch of n decays by its
            # n-th power, so the batch size doesn't change how long the past counts.
            decay = self.baseline_decay ** len(measured)
            self.baseline += (1 - decay) * float(above.mean())
            # std = sqrt(running mean of squares), this batch included. The batch's own std would give 0 / 0
            # for a single sample. The very first sample has A = 0, and the 1e-6 keeps it 0. self.weight tends
            # to 1; dividing by it corrects the start, as in Adam.
            self.square = decay * self.square + (1 - decay) * float(above.square().mean())
            self.weight = decay * self.weight + (1 - decay)
            A[~failed] = above / (math.sqrt(self.square / self.weight) + 1e-6)
        return A.float()

    def update(self, tokens, old_log_prob, reward, failed=None):
        """One update with a batch of any size: tokens (n, 5L); old_log_prob (n,), as `sample` returned it;
        reward (n,); failed (n,) bool, True where the reward could not be measured (None: none failed).

        Returns a dict of floats: `baseline` after the update, and five figures of the last gradient step,
        taken before it changes the policy (with replay: their means over all steps):
        loss            -(surrogate + entropy_weight * entropy)
        approx_kl       mean of (r - 1) - log r over the ratios r: how far the policy has moved
        clip_fraction   share of ratios outside 1 +- clip; if it stays high, lower the learning rate
        entropy         nats per string; 53 at the start for L = 5, near 0 once the policy has settled
        grad_norm       before clipping
        Raises ValueError when a shape is wrong, a token is out of range, a number is not finite or failed is
        not bool. Policy and baseline are then unchanged."""
        tokens = torch.as_tensor(tokens)
        old_log_prob = torch.as_tensor(old_log_prob, dtype=torch.float32).detach()
        reward = torch.as_tensor(reward, dtype=torch.float64).detach()
        shape = tokens.shape[:1]
        failed = torch.zeros(shape, dtype=torch.bool) if failed is None else torch.as_tensor(failed)
        for name, value in (("old_log_prob", old_log_prob), ("reward", reward), ("failed", failed)):
            if value.shape != shape:         # (n,) - (n, 1) would silently broadcast to (n, n)
                raise ValueError(f"{name} must be {tuple(shape)}, one per string, got {tuple(value.shape)}")
            if not value.isfinite().all():
                raise ValueError(f"{name} must be finite, got {value.tolist()}")
        if failed.dtype != torch.bool:       # ~ of the integers 0 and 1 is -1 and -2, not True and False
            raise ValueError(f"failed must be bool, got {failed.dtype}")
        self.controller._check_tokens(tokens)
        if self.replay:
            return self._replayed(tokens, old_log_prob, reward, failed)
        advantage = self._advantage(reward, failed)       # (n,)
        for _ in range(self.epochs):
            figures = self._step(tokens, old_log_prob, advantage)
        return {**figures, "baseline": self.baseline or 0.0}

    def _step(self, tokens, old_log_prob, advantage):
        """One step of Adam:  maximise  mean min(r A, clip(r, 1 - eps, 1 + eps) A) + w H.

        The clip: where A > 0, no r above 1 + eps gains more; where A < 0, none below 1 - eps. The gradient
        is 0 there, so no sample moves the policy far from the one that sampled it. The min: without it the
        gradient would be 0 on the other side, too, and a good string that an earlier step made unlikely
        (A > 0, r < 1 - eps) would stay so. The min takes r A there, whose gradient brings it back."""
        log_prob, entropy = self.controller.log_prob(tokens)          # (n,), (n,)
        log_ratio = log_prob - old_log_prob               # (n,), 0 before the first step
        ratio = log_ratio.exp()                           # r = pi / pi_old
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        surrogate = torch.minimum(ratio * advantage, clipped * advantage).mean()
        entropy = entropy.mean()                          # H
        loss = -(surrogate + self.entropy_weight * entropy)
        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.controller.parameters(), self.max_grad_norm,
                                             error_if_nonfinite=True)
        self.optimizer.step()
        outside = (ratio - 1).abs() > self.clip
        return {"loss": loss.item(), "approx_kl": (ratio - 1 - log_ratio).mean().item(),
                "clip_fraction": outside.float().mean().item(), "entropy": entropy.item(),
                "grad_norm": grad_norm.item()}

    def _replayed(self, tokens, old_log_prob, reward, failed):
        """The update of [18]'s code. First the baseline moves. Then each of the last `replay` samples gets
        a gradient step of its own, in random order, with A = reward - the new baseline, not normalised.
        (In [18] the memory starts full of zeros; here it holds real samples only.)"""
        self.memory = (self.memory + list(zip(tokens, old_log_prob, reward)))[-self.replay:]
        for value in reward[~failed].tolist():
            before = value if self.baseline is None else self.baseline
            self.baseline = self.baseline_decay * before + (1 - self.baseline_decay) * value
        figures = []
        for _ in range(self.epochs):
            for k in torch.randperm(len(self.memory), generator=self.order).tolist():
                string, old, value = self.memory[k]
                advantage = (value - (self.baseline or 0.0)).float()
                figures.append(self._step(string[None], old[None], advantage[None]))
        means = {name: sum(step[name] for step in figures) / len(figures) for name in figures[0]}
        return {**means, "baseline": self.baseline or 0.0}

    def state_dict(self):
        """All that the next update depends on, including the controller, as torch.load(weights_only=True)
        can read it."""
        return {"controller": self.controller.state_dict(), "optimizer": self.optimizer.state_dict(),
                "baseline": self.baseline, "square": self.square, "weight": self.weight,
                "memory": self.memory, "order": self.order.get_state()}

    def load_state_dict(self, state):
        """Restores what state_dict returned, including the controller and the learning rate.

        Raises KeyError or torch's RuntimeError when it is the state of something else."""
        self.controller.load_state_dict(state["controller"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.order.set_state(state["order"])
        for name in ("baseline", "square", "weight", "memory"):
            setattr(self, name, state[name])


# ---- Early stop ----------------------------------------------------------------------------------

class EarlyStop:
    """Sect. 4.1: an un-promising candidate is stopped half way through its training. Two rules decide:

    "as-in-18"  "As done in [18]", to the letter of its code. A running value starts at 0.01. At a check it
                first moves, value = 0.99 value + 0.01 score. The candidate continues if its score is above
                value (1 - u), where u is uniform in [0, delta]. The tolerance delta starts at 0.9 and ends at
                0.27 or above (FACTORS). So hardly any of the first hundred candidates is stopped.
    "average"   [ours], for short searches. A candidate continues if its score is not below the running
                average of the half-way scores; `decay` is that average's.

    [ours] `promising` changes nothing, and `move` takes in the scores of a round when the round is over, so
    that several processes can share it and agree. With one candidate per round, as in [18], the decisions are
    [18]'s. With n, a candidate's check doesn't see the other n - 1 scores of its round."""

    # [18] lowers delta at a check where the counter is exactly one of these. The counter moves by one per
    # check, and by one more if the score is above the value. A factor that it jumps over is never applied.
    FACTORS = {100: 0.9, 200: 0.8, 300: 0.7, 400: 0.6}

    def __init__(self, rule, decay):
        self.rule, self.delta, self.count = rule, 0.9, 0
        self.value, self.decay = (0.01, 0.99) if rule == "as-in-18" else (None, decay)

    def promising(self, score, draw):
        """Whether a candidate with this half-way score continues. draw: uniform in 0..1."""
        if self.rule == "average":
            return self.value is None or score >= self.value
        delta = self.delta * self.FACTORS.get(self.count, 1)
        value = 0.99 * self.value + 0.01 * score                  # this score is in the value already
        return score > value * (1 - delta * draw)                 # u = delta * draw

    def move(self, score):
        """Takes a candidate's half-way score into the running value, and moves tolerance and counter."""
        self.delta *= self.FACTORS.get(self.count, 1)
        self.value = score if self.value is None else self.decay * self.value + (1 - self.decay) * score
        self.count += 2 if score > self.value else 1


# ---- A search whose answer is known --------------------------------------------------------------

def planted_reward(controller, seed=0, noise=0.03):
    """A hidden best string, and a reward that rises with the share of tokens that equal those of the best.

    Returns best (5L,) and reward(tokens (n, 5L), generator=None) -> (n,) float64: 1 for the best string, 0.54
    for one that shares no token with it. A generator adds normal noise of std `noise`. For L = 5 random
    strings have a mean reward of 0.60, and the best of 500 has 0.70 (0.74 with noise)."""
    best = controller.random(1, torch.Generator().manual_seed(seed))[0]         # (5L,)

    def reward(tokens, generator=None):
        value = 1 - 0.46 * (tokens != best).double().mean(dim=1)      # (n, 5L) -> (n,)
        if generator is not None:
            value = value + noise * torch.randn(len(tokens), generator=generator, dtype=torch.float64)
        return value

    return best, reward


def search(seed, samples, rollout):
    """Searches for a planted genotype with PPO, and with random search. Returns the noise-free rewards of
    both, (samples,) each (PPO: up to whole rollouts), and the policy's entropy, (updates,)."""
    generator = torch.Generator().manual_seed(seed)
    controller = Controller(5, generator=generator)
    ppo = PPO(controller)
    _, reward = planted_reward(controller, seed)
    found, entropy = [], []
    while len(found) * rollout < samples:
        tokens, log_prob = controller.sample(rollout, generator)
        figures = ppo.update(tokens, log_prob, reward(tokens, generator))
        entropy.append(figures["entropy"])
        found.append(reward(tokens))
    uniform = reward(controller.random(samples, generator))
    return torch.cat(found), uniform, torch.tensor(entropy)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description="Compares PPO with random search on a planted genotype, after every 50 samples.")
    parser.add_argument("--samples", type=int, default=300, help="samples per search (default: 300)")
    parser.add_argument("--rollout", type=int, default=10, help="samples per update of PPO (default: 10)")
    parser.add_argument("--seeds", type=int, default=3, help="searches to average over (default: 3)")
    args = parser.parse_args(arguments)
    if min(args.samples, args.rollout, args.seeds) < 1:
        parser.error("--samples, --rollout and --seeds must be at least 1")
    began = time.time()
    runs = [search(seed, args.samples, args.rollout) for seed in range(args.seeds)]
    found, uniform, entropy = [torch.stack(figures) for figures in zip(*runs)]  # (seeds, samples or updates)
    print("The planted genotype has L = 5 and reward 1. PPO sees rewards with noise (std 0.03); the\n"
          f"figures are without noise. Rollouts of {args.rollout}; mean of {args.seeds} seeds.\n\n"
          f"{'':7}   mean of the last 50       best so far       entropy\n"
          f"samples {'PPO':>9} {'random':>9} {'PPO':>9} {'random':>9} {'of PPO':>9}")
    for k in range(50, args.samples + 1, 50):
        last = [rewards[:, k - 50:k].mean() for rewards in (found, uniform)]
        best = [rewards[:, :k].amax(dim=1).mean() for rewards in (found, uniform)]
        nats = entropy[:, (k - 1) // args.rollout].mean()
        print(f"{k:7} " + " ".join(f"{x:9.3f}" for x in last + best) + f" {nats:9.1f}")
    print(f"\n{time.time() - began:.1f} s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
