"""An exact solver for KL-regularised control on small token trees, by soft Bellman backups.

A state is the string of actions taken so far, "" the prompt; a response ends after `depth` actions.

    Q*(s,a) = r(s,a) + discount V*(sa),   V*(end) = 0                       r, pi_ref: dicts by state-action, keyed s + a
    V*(s)   = beta log sum_a pi_ref(a|s) exp(Q*(s,a) / beta)
    pi*(a|s) = pi_ref(a|s) exp((Q*(s,a) - V*(s)) / beta)
"""

import itertools
import math


class Tree:
    def __init__(self, actions="ab", depth=2):
        self.actions, self.depth = actions, depth
        self.states = ["".join(s) for n in range(depth + 1) for s in itertools.product(actions, repeat=n)]
        self.responses = [s for s in self.states if len(s) == depth]
        self.steps = [s for s in self.states if s]                  # s + a, one for every action of every state

    def uniform(self):
        return {step: 1 / len(self.actions) for step in self.steps}

    def at_the_end(self, rewards):
        """A reward paid by the last action alone."""
        return {step: rewards.get(step, 0.0) for step in self.steps}

    def shaped(self, reward, phi, alpha=1.0, gamma=1.0):
        """r~(s,a) = r(s,a) + alpha (gamma Phi(sa) - Phi(s)); phi: dict by state, terminal ones included."""
        return {step: reward[step] + alpha * (gamma * phi[step] - phi[step[:-1]]) for step in self.steps}

    def solve(self, ref, reward, beta=1.0, discount=1.0):
        """-> V* by state, Q* and pi* by state-action."""
        value, q, policy = {s: 0.0 for s in self.responses}, {}, {}
        for s in sorted(self.states, key=len, reverse=True):
            if len(s) == self.depth:
                continue
            for a in self.actions:
                q[s + a] = reward[s + a] + discount * value[s + a]
            value[s] = beta * math.log(sum(ref[s + a] * math.exp(q[s + a] / beta) for a in self.actions))
            for a in self.actions:
                policy[s + a] = ref[s + a] * math.exp((q[s + a] - value[s]) / beta)
        return value, q, policy

    def response_probs(self, policy):
        return {y: math.prod(policy[y[:k + 1]] for k in range(self.depth)) for y in self.responses}
