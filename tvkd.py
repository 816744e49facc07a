"""Teacher Value-based Knowledge Distillation (TVKD), each equation a pure function of tensors.

Paper: Kwon, Ko, Kim, Kim, "Preference Distillation via Value based Reinforcement Learning", NeurIPS 2025, arXiv 2509.16965.
Also:  DPO, Rafailov et al. 2023, arXiv 2305.18290; language-model logits as Q-values ("From r to Q*"), Rafailov et al. 2024,
       arXiv 2404.12358; potential-based shaping, Ng, Harada, Russell 1999; its terminal state, Grzes 2017 (AAMAS).

In order: log-probabilities -> DPO -> the teacher's value function -> shaping -> the TVKD loss -> the baselines' losses.
Left out: models, text, training loops. Each loss but the last two (token means) is per pair; the caller averages.

Deviations from the paper (why: README, "What holds, and what does not")
1. The teacher's value has a second form, `implicit_value`, which its logits' free constant c(s) cannot move. It is the default.
2. The terminal potential is an explicit argument of `shaping`. Only "zero", with gamma = 1, preserves the optimal policy; it
   also makes the TVKD loss equal DPO's. Whatever TVKD adds to DPO comes from the other two.

Symbols. B rows; V tokens in the vocabulary; a row `tokens` has T+1 ids: prompt, response, EOS, padding.
    state  s_t = tokens[: t+1]     T+1 of them: logits[:, t] and values[:, t] belong to s_t
    action a_t = tokens[t+1]       T of them:   logps[:, t], psi[:, t] and mask[:, t] belong to a_t
    mask[:, t] is True (or 1) where a_t is a response token, EOS included. s_p is the last prompt state, in which the first
    response action is taken; s_end is the state after EOS. w is the chosen response, l the rejected one.
Log-probs and losses are in nats, values, potentials, psi and rewards in beta * nats. Logits in half precision are raised to
float32, float64 stays. Every function raises ValueError, saying what was expected and what came, where the shapes of two
arguments do not match.
"""

import torch
import torch.nn.functional as F


def _expect_shape(shape, **tensors):
    for name, tensor in tensors.items():
        if tensor.shape != torch.Size(shape):
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")


def _at_least_float32(logits):
    """Half-precision logits as float32; float32 and float64 as they are. A bfloat16 sum near -300 is off by up to 1 nat."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


# ---------------------------------------------------------------------------------------------------------------------------
# Log-probabilities.   log pi(y|x) = sum_t log pi(a_t|s_t)

def action_logps(logits, actions):
    """log pi(a|s) = logits[a] - logsumexp(logits) of one action in each state.

    logits of any shape (..., V), here of the states that count alone (n, V); actions (...) ids -> (...) nats.
    """
    _expect_shape(logits.shape[:-1], actions=actions)
    logits = _at_least_float32(logits)
    return logits.gather(-1, actions.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def token_logps(logits, tokens):
    """log pi(a_t|s_t) of every action.

    logits (B, T+1, V), tokens (B, T+1) ids -> (B, T) nats.

    Example: tokens [7, 8, 9] give two numbers, log p(8 | 7) from logits[:, 0] and log p(9 | 7, 8) from logits[:, 1].
    """
    _expect_shape(logits.shape[:2], tokens=tokens)
    actions = tokens[:, 1:]                                         # (B, T)    a_t = tokens[t+1]
    logits = logits[:, :-1]                                         # (B, T, V) the last state is never acted in
    # Trap: a padding state whose logits are all -inf has no distribution; masking its log-prob later would still send NaN
    # (0 * inf) back through logsumexp, so it is made uniform here.
    logits = logits.masked_fill(logits.amax(-1, keepdim=True).isneginf(), 0.0)
    return action_logps(logits, actions)                            # (B, T)


def sequence_logps(logps, mask):
    """log pi(y|x): the SUM over response tokens (a mean would be another loss, with another beta).

    logps (B, T) nats, mask (B, T) -> (B,) nats. What stands outside the mask, inf and NaN included, has no effect.
    """
    _expect_shape(logps.shape, mask=mask)
    return torch.where(mask.bool(), logps, 0.0).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------------
# DPO.   L = -log sigmoid( beta [ log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l) ] )              arXiv 2305.18290, eq. 7

def _reward_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """beta times the difference of the log-ratios: how much more implicit reward the policy gives the chosen response."""
    _expect_shape(policy_chosen.shape, policy_rejected=policy_rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    chosen_logratio = policy_chosen - ref_chosen.detach()           # log pi(y_w|x) / pi_ref(y_w|x)
    rejected_logratio = policy_rejected - ref_rejected.detach()     # log pi(y_l|x) / pi_ref(y_l|x)
    return beta * (chosen_logratio - rejected_logratio)


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """The DPO loss of each pair. Four sequence log-probs (B,) in nats -> (B,) nats.

    A larger beta keeps the policy closer to the reference. No gradient reaches the reference. At policy = reference the loss
    is ln 2.
    """
    return -F.logsigmoid(_reward_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta))


# ---------------------------------------------------------------------------------------------------------------------------
# The teacher's value function, in two forms.

# The paper's:   V_phi(s) = beta log sum_a exp(Q_phi(s,a)/beta) = beta logsumexp(logits),   since logits = Q/beta    2404.12358

def soft_value(logits, beta):
    """Soft value of every state from the teacher's RAW logits, of any shape (..., V), here (B, T+1, V) -> (B, T+1).

    Trap: of log-probabilities it would be 0 everywhere, logsumexp(log_softmax(z)) = 0. Trap: a constant c(s) added to the
    logits of a state leaves the policy as it is and moves this value by beta * c(s), and no likelihood pins c(s) down.
    """
    return beta * _at_least_float32(logits).logsumexp(-1)


# Ours:   V_phi(s_{p+k}) - V_phi(s_p) = sum_{i<k} beta log pi_phi(a_i|s_i) / pi_phi,ref(a_i|s_i),   i from the first response
# action. The soft Bellman equation beta log pi*/pi_ref = r + V(s') - V(s), summed along a prefix on which r is still 0.

def implicit_value(teacher_logps, teacher_ref_logps, mask, beta):
    """The teacher's value of every state, relative to the prompt: what its own log-ratios have added up to so far.

    teacher_logps, teacher_ref_logps (B, T) nats of the DPO-trained teacher and of the SFT teacher it started from; mask (B, T);
    beta the teacher's -> (B, T+1). 0 up to and including s_p, constant from s_end on, where it is the teacher's implicit reward
    of the whole response.

    Example: log-ratios [., 2, -3, .] with mask [0, 1, 1, 0] and beta 1 give [0, 0, 2, -1, -1].
    """
    _expect_shape(teacher_logps.shape, teacher_ref_logps=teacher_ref_logps, mask=mask)
    logratios = torch.where(mask.bool(), teacher_logps - teacher_ref_logps, 0.0)            # (B, T)
    return beta * F.pad(logratios.cumsum(-1), (1, 0))                                       # (B, T+1)


# ---------------------------------------------------------------------------------------------------------------------------
# Shaping.   psi_t = gamma Phi(s_{t+1}) - Phi(s_t),   Phi = V_phi,   gamma = 1                       the paper; Ng et al. 1999
#
# Summed over a response with gamma = 1 this telescopes to Phi(s_end) - Phi(s_p). Phi(s_p) belongs to the prompt and cancels
# between two answers to it, so a pair only ever sees Phi(s_end). Hence `terminal`:
#   "zero"   Phi(s_end) = 0             strict shaping: the optimal policy is preserved, and the loss is DPO's
#   "hold"   Phi(s_end) = Phi(s_end-1)  the last state in which a token was chosen; for logits, never trained after EOS
#   "value"  Phi(s_end) = V_phi(s_end)  the teacher's value of the finished answer stays, as a soft label
# With gamma < 1 the plain sum also keeps -(1 - gamma) times the sum of Phi(s_t), p < t < end: mostly a bias on length.

def shaping(values, mask, gamma=1.0, terminal="value"):
    """psi of every action: values (B, T+1), mask (B, T) -> (B, T), 0 outside the mask. No gradient flows to the values.

    Only states s_p to s_end of each row are read; s_end is found from the mask, so padding of any width and content changes
    nothing. Raises ValueError for another `terminal` and for a row without a response token.

    Example: values (2, 5, 3, 4), mask (1, 1, 1), gamma 1: "zero" (3, -2, -3), "hold" (3, -2, 0), "value" (3, -2, 1).
    """
    if terminal not in ("zero", "hold", "value"):
        raise ValueError(f'terminal: expected "zero", "hold" or "value", got {terminal!r}')
    _expect_shape((mask.shape[0], mask.shape[1] + 1), values=values)
    mask = mask.bool()
    if not mask.any(-1).all():
        raise ValueError("mask: expected at least one response token in every row, got a row without any")
    potential, following = values.detach()[:, :-1], values.detach()[:, 1:]                  # (B, T) Phi(s_t), Phi(s_{t+1})
    actions = torch.arange(mask.shape[1], device=mask.device)
    is_last = actions == torch.where(mask, actions, -1).amax(-1, keepdim=True)              # (B, T) the action that enters s_end
    if terminal == "zero":
        following = torch.where(is_last, 0.0, following)
    elif terminal == "hold":
        following = torch.where(is_last, potential, following)
    return torch.where(mask, gamma * following - potential, 0.0)


# ---------------------------------------------------------------------------------------------------------------------------
# TVKD.   L = -log sigmoid( beta [log-ratio_w - log-ratio_l] - alpha [sum_t psi_w - sum_t psi_l] )                  the paper
#
# Why MINUS. The student is to be optimal for the SHAPED reward r + alpha psi, while the labels speak of r. The Bellman equation
# of the shaped problem, summed over a response, reads  sum r = beta log-ratio - alpha sum psi + (prompt only);  Bradley-Terry
# on r gives the line above. The student's margin must EXCEED the teacher's value difference to satisfy the label.

def tvkd_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, psi_chosen, psi_rejected, beta, alpha):
    """The TVKD loss of each pair. Four sequence log-probs (B,) in nats, summed psi of each response (B,) -> (B,) nats.

    psi is a constant of the data: no gradient reaches it, so the teacher only re-weights pairs, by
    sigmoid(alpha dpsi - beta dlogratio): up where it sees a larger difference than the student, down where it disagrees with
    the label. alpha = 0 is DPO.
    """
    _expect_shape(policy_chosen.shape, psi_chosen=psi_chosen, psi_rejected=psi_rejected)
    margin = _reward_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    return -F.logsigmoid(margin - alpha * (psi_chosen - psi_rejected).detach())


# ---------------------------------------------------------------------------------------------------------------------------
# The baselines' losses.   KD: mean over response states of KL(teacher || student);   SFT, behaviour cloning: mean of -log pi(a|s)

def kd_loss(student_logits, teacher_logits, mask):
    """KL(teacher || student), summed over the vocabulary, averaged over masked tokens: two (B, T+1, V), mask (B, T) -> nats.

    No gradient reaches the teacher. Two vocabularies, that is two sizes V, are refused, and so is an empty mask.
    """
    _expect_shape(student_logits.shape, teacher_logits=teacher_logits)
    _expect_shape((student_logits.shape[0], student_logits.shape[1] - 1), mask=mask)
    mask = _non_empty(mask)
    student = F.log_softmax(_at_least_float32(student_logits[:, :-1][mask]), -1)            # (response tokens, V)
    teacher = F.softmax(_at_least_float32(teacher_logits.detach()[:, :-1][mask]), -1)
    return F.kl_div(student, teacher, reduction="sum") / mask.sum()


def nll_loss(logps, mask):
    """-log pi(a_t|s_t), averaged over masked tokens: logps (B, T) nats, mask (B, T) -> nats per token. Refuses an empty mask."""
    _expect_shape(logps.shape, mask=mask)
    return -logps[_non_empty(mask)].mean()


def _non_empty(mask):
    if not mask.any():
        raise ValueError("mask: expected at least one response token, got none")
    return mask.bool()
