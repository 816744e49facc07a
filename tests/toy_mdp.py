"""Small token trees on which everything can be computed exactly.

A state is the string of actions taken so far, "" the prompt. A response ends after `depth` actions.
`Tree.solve` does soft Bellman backups:

    Q*(s,a)  = r(s,a) + discount V*(sa),   V*(end) = 0         r and pi_ref are dicts keyed by s + a
    V*(s)    = beta log sum_a pi_ref(a|s) exp(Q*(s,a) / beta)
    pi*(a|s) = pi_ref(a|s) exp((Q*(s,a) - V*(s)) / beta)

`fit` trains a tabular policy on any loss by full-batch optimisation, to see where the loss leads.
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F


class Tree:
    def __init__(self, actions="ab", depth=2):
        self.actions, self.depth = actions, depth
        strings = (itertools.product(actions, repeat=n) for n in range(depth + 1))
        self.states = ["".join(s) for s in itertools.chain(*strings)]
        self.responses = [s for s in self.states if len(s) == depth]
        self.steps = [s for s in self.states if s]      # s + a, one for every action of every state

    def uniform(self):
        return {step: 1 / len(self.actions) for step in self.steps}

    def at_the_end(self, rewards):
        """A reward paid by the last action alone."""
        return {step: rewards.get(step, 0.0) for step in self.steps}

    def shaped(self, reward, phi, alpha=1.0, gamma=1.0):
        """r~(s,a) = r(s,a) + alpha (gamma Phi(sa) - Phi(s)); phi by state, terminal ones too."""
        return {step: reward[step] + alpha * (gamma * phi[step] - phi[step[:-1]])
                for step in self.steps}

    def solve(self, ref, reward, beta=1.0, discount=1.0):
        """-> V* by state, Q* and pi* by state-action."""
        value, q, policy = {s: 0.0 for s in self.responses}, {}, {}
        for s in reversed(self.states):                 # longest first
            if len(s) == self.depth:
                continue
            q |= {s + a: reward[s + a] + discount * value[s + a] for a in self.actions}
            total = sum(ref[s + a] * math.exp(q[s + a] / beta) for a in self.actions)
            value[s] = beta * math.log(total)
            for a in self.actions:
                policy[s + a] = ref[s + a] * math.exp((q[s + a] - value[s]) / beta)
        return value, q, policy

    def response_probs(self, policy):
        """{response: probability}"""
        return {y: math.prod(policy[y[:k + 1]] for k in range(self.depth)) for y in self.responses}

    def tokens(self):
        """(responses, depth + 1) ids: 0 for the prompt, then 1 for the first action, and so on."""
        return torch.tensor([[0] + [1 + self.actions.index(a) for a in y] for y in self.responses])

    def logits(self, policy):
        """(responses, depth + 1, 1 + actions): log pi along each response.

        The prompt's token has probability 0. In the last state nothing is chosen: zeros."""
        shape = len(self.responses), self.depth + 1, 1 + len(self.actions)
        logits = torch.full(shape, -torch.inf, dtype=torch.double)
        for row, y in enumerate(self.responses):
            for k in range(self.depth):
                for i, a in enumerate(self.actions):
                    logits[row, k, 1 + i] = math.log(policy[y[:k] + a])
        logits[:, -1] = 0.0
        return logits

    def along(self, by_state):
        """A dict by state -> (responses, depth + 1), its numbers along each response."""
        return torch.tensor([[by_state[y[:k]] for k in range(self.depth + 1)]
                             for y in self.responses], dtype=torch.double)


def fit(tree, loss, steps=500):
    """The tabular policy, uniform at the start, that minimises loss(logits), as {step: pi(a|s)}.
    `loss` gets logits as a language model would give them for `tree.tokens()`. L-BFGS, float64."""
    inner = [s for s in tree.states if len(s) < tree.depth]
    rows = torch.tensor([[inner.index(y[:k]) for k in range(tree.depth)] for y in tree.responses])
    table = torch.zeros(len(inner), len(tree.actions), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=steps, tolerance_grad=1e-12, tolerance_change=0,
                                  line_search_fn="strong_wolfe")
    optimizer.step(functools.partial(_loss_with_gradient, optimizer, table, rows, loss))
    probs = table.detach().softmax(-1).tolist()
    return {s + a: probs[i][j] for i, s in enumerate(inner) for j, a in enumerate(tree.actions)}


def _loss_with_gradient(optimizer, table, rows, loss):
    optimizer.zero_grad()
    logits = F.pad(table[rows], (0, 0, 0, 1))           # the state after the end: never read
    value = loss(F.pad(logits, (1, 0), value=-1e4))     # the prompt's token: never chosen
    value.backward()
    return value
