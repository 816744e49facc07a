"""Teacher Value-based Knowledge Distillation (TVKD): every equation is a pure function of tensors.

The method is from Kwon, Ko, Kim, Kim, "Preference Distillation via Value based Reinforcement
Learning", NeurIPS 2025, arXiv 2509.16965.

    AS WE READ THE ABSTRACT AND INTRODUCTION. Apart from these we have seen only the released
    code, whose branches disagree about the sign of psi (docs/released-code.md). So the loss, its
    sign, the form of the value, the terminal state and gamma = 1 are our reading throughout.

DPO                          Rafailov et al. 2023, arXiv 2305.18290
logits as Q-values           "From r to Q*", Rafailov et al. 2024, arXiv 2404.12358
potential-based shaping      Ng, Harada, Russell 1999; its terminal state: Grzes 2017 (AAMAS)
margin offset                Amini, Vieira, Cotterell 2024 (ODPO), arXiv 2402.10571

Order: log-probabilities, DPO, the teacher's value, shaping, the TVKD loss, the baselines' losses.
There is nothing here about models, text or training loops. The derivations are in docs/theory.md.
A loss is one number per pair and the caller averages; the last two losses are means over tokens.

Two choices are left to the caller, because they decide what TVKD does.
1. The value: `soft_value` reads raw logits, but training never fixes their constant c(s) per state.
   `implicit_value` does not depend on c(s). It is ours, and the default.
2. The potential of the finished answer: `terminal` in `shaping`. With "zero" and gamma = 1 TVKD is
   DPO for two answers to one prompt. Then all that it adds comes from the other two. A true value
   is 0 there, since no reward is left: what helps is the teacher's reward of the answer.

Symbols. B rows, V tokens in the vocabulary. A row of `tokens` has T+1 ids: prompt, response, EOS,
padding.
    state  s_t = tokens[: t+1]     T+1 of them: logits[:, t] and values[:, t] belong to s_t
    action a_t = tokens[t+1]       T of them:   logps[:, t], psi[:, t] and mask[:, t] belong to a_t
`mask` is True (or 1) where a_t is a response token, EOS included. The first response action is
taken in s_p, the last state of the prompt. s_end is the state after EOS. w is the chosen response,
l the rejected one; phi marks the teacher; "log-ratio" is log pi(y|x) - log pi_ref(y|x).
Log-probs and losses are in nats; values, potentials, psi and rewards in beta * nats.

Half-precision logits are raised to float32, float64 stays. If the shapes of two arguments do not
match, a function raises ValueError with the expected shape and the one it got. No argument is
written into. Gradients reach policy and student; where a docstring is silent, they may go anywhere.
"""

import torch
import torch.nn.functional as F


def _expect_shape(shape, **tensors):
    for name, tensor in tensors.items():
        if tensor.shape != torch.Size(shape):
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")


def _at_least_float32(logits):
    # bfloat16 numbers near -300 are 2 apart: a summed log-prob would be off by up to 1 nat.
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


# --------------------------------------------------------------------------------------------------
# Log-probabilities.   log pi(y|x) = sum_t log pi(a_t|s_t)

def action_logps(logits, actions):
    """log pi(a|s) = logits[a] - logsumexp(logits), for one action in each state.

    logits (..., V), with gradient, actions (...) ids -> (...) nats. In training (n, V), no padding.
    """
    _expect_shape(logits.shape[:-1], actions=actions)
    logits = _at_least_float32(logits)
    # Same as gathering from log_softmax, but no second tensor of the size of the logits.
    return logits.gather(-1, actions.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def token_logps(logits, tokens):
    """log pi(a_t|s_t) of every action: `action_logps` of whole rows, padding included.

    logits (B, T+1, V), with gradient, tokens (B, T+1) ids -> (B, T) nats. The last state has no
    action. In padding all logits of a state may be -inf; its gradient is 0 then, never NaN.

    Example: tokens [7, 8, 9] give log p(8 | 7) from logits[:, 0] and log p(9 | 7, 8) from
    logits[:, 1].
    """
    _expect_shape(logits.shape[:2], tokens=tokens)
    states = logits[:, :-1]                             # (B, T, V)  no action in the last state
    # Trap: padding may have logits of -inf only. Masking the log-prob later is too late: 0 * inf
    # would send NaN back through logsumexp. Whoever selects the response states never meets this.
    states = states.masked_fill(states.amax(-1, keepdim=True).isneginf(), 0.0)
    return action_logps(states, tokens[:, 1:])          # (B, T)     a_t = tokens[t+1]


def sequence_logps(logps, mask):
    """log pi(y|x): the SUM over response tokens. A mean would be another loss with another beta.

    logps (B, T) nats, with gradient, mask (B, T) -> (B,) nats. Outside the mask anything may stand,
    NaN too; inside it -inf stays -inf.
    """
    _expect_shape(logps.shape, mask=mask)
    return torch.where(mask.bool(), logps, 0.0).sum(-1)     # where, not *: 0 * NaN is NaN


# --------------------------------------------------------------------------------------------------
# DPO.   L = -log sigmoid( beta [ log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l) ] )
#                                                                     arXiv 2305.18290, equation 7

def _reward_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """How much more implicit reward the policy gives the chosen response, beta * nats."""
    _expect_shape(policy_chosen.shape, policy_rejected=policy_rejected, ref_chosen=ref_chosen,
                  ref_rejected=ref_rejected)
    chosen_logratio = policy_chosen - ref_chosen.detach()           # log pi(y_w|x) / pi_ref(y_w|x)
    rejected_logratio = policy_rejected - ref_rejected.detach()     # log pi(y_l|x) / pi_ref(y_l|x)
    return beta * (chosen_logratio - rejected_logratio)


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """The DPO loss of each pair, from sequence log-probs (B,) in nats -> (B,) nats.

    A larger beta keeps the policy closer to the reference. No gradient reaches the reference.
    At policy = reference the loss is ln 2 and the gradient is not zero.
    """
    margin = _reward_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    return -F.logsigmoid(margin)                        # log(sigmoid(-900)) would be -inf


# --------------------------------------------------------------------------------------------------
# The teacher's value, in two forms.
#
# From logits:   V_phi(s) = beta log sum_a exp(Q_phi(s,a)/beta)                     arXiv 2404.12358

def soft_value(logits, beta):
    """V(s) = beta * logsumexp(logits), with logits = Q/beta and beta log pi_ref counted into Q.

    RAW logits (..., V) -> (...). Trap: log-probs give 0, since logsumexp(log_softmax(z)) = 0.
    Trap: c(s) added to all logits of a state changes no probability, so no likelihood fixes it;
    yet it moves this value by beta * c(s).
    """
    return beta * _at_least_float32(logits).logsumexp(-1)


# From log-ratios:   V_phi(s_{p+k}) - V_phi(s_p) = sum_{i<k} beta log pi_phi(a_i|s_i) /
#                    pi_phi,ref(a_i|s_i), with i counted from the first response action.
# This is the soft Bellman equation beta log pi*/pi_ref = r + V(s') - V(s), summed over a prefix in
# which no reward has been paid yet. The last action pays it: at s_end the sum is no value (V is 0
# there) but the teacher's implicit reward of the answer. Ours.

def implicit_value(teacher_logps, teacher_ref_logps, mask, beta):
    """The teacher's value of every state, relative to the prompt: its log-ratios, added up so far.

    teacher_logps, teacher_ref_logps (B, T) nats, of the DPO-trained teacher and of the model it
    started from; mask (B, T); beta of the teacher's DPO -> (B, T+1). It is 0 up to and including
    s_p. From s_end on it is the teacher's implicit reward of the whole response.

    Example: log-ratios [., 2, -3, .] with mask [0, 1, 1, 0] and beta 1 give [0, 0, 2, -1, -1].
    """
    _expect_shape(teacher_logps.shape, teacher_ref_logps=teacher_ref_logps, mask=mask)
    logratios = torch.where(mask.bool(), teacher_logps - teacher_ref_logps, 0.0)    # (B, T)
    return beta * F.pad(logratios.cumsum(-1), (1, 0))                               # (B, T+1)


# --------------------------------------------------------------------------------------------------
# Shaping.   psi_t = gamma Phi(s_{t+1}) - Phi(s_t),   Phi = V_phi           Ng, Harada, Russell 1999
#
# With gamma = 1 the sum over a response is Phi(s_end) - Phi(s_p). Phi(s_p) is the same for two
# answers to one prompt and cancels in a pair. Only Phi(s_end) is left, and `terminal` sets it:
#   "zero"   Phi(s_end) = 0             preserves the optimum, and the TVKD loss equals DPO's; any
#                                       number that depends on the prompt alone would do the same
#   "hold"   Phi(s_end) = Phi(s_end-1)  the state in which EOS was chosen; for `soft_value`, because
#                                       the network's output after EOS was never trained
#   "value"  Phi(s_end) as given        of `implicit_value`: the teacher's reward of the answer
# With gamma < 1 the plain sum is gamma Phi(s_end) - Phi(s_p) - (1 - gamma) sum_{p<t<end} Phi(s_t).
# So even "zero" moves the optimum. If Phi has one sign, this tends to be a bias on length.

def shaping(values, mask, gamma=1.0, terminal="value"):
    """psi of every action: values (B, T+1), mask (B, T) -> (B, T), 0 outside the mask.

    `terminal` sets Phi(s_end): "zero" 0, "hold" Phi of the state before it, "value" its value. No
    gradient flows to the values. Only the states s_p to s_end of each row are read, and s_end is
    located by the mask, so padding of any width and content changes nothing. Raises ValueError
    for another `terminal` and for a row without a response token.

    Example: values (2, 5, 3, 4), mask (1, 1, 1), gamma 1 give (3, -2, -3) with "zero",
    (3, -2, 0) with "hold", (3, -2, 1) with "value".
    """
    if terminal not in ("zero", "hold", "value"):
        raise ValueError(f'terminal: expected "zero", "hold" or "value", got {terminal!r}')
    _expect_shape((mask.shape[0], mask.shape[1] + 1), values=values)
    mask = mask.bool()
    if not mask.any(-1).all():
        raise ValueError("mask: expected at least one response token in every row, "
                         "got a row without any")
    values = values.detach()
    potential, following = values[:, :-1], values[:, 1:]            # (B, T) Phi(s_t), Phi(s_{t+1})
    actions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, actions, -1).amax(-1, keepdim=True)    # (B, 1) the action into s_end
    if terminal == "zero":
        following = torch.where(actions == last, 0.0, following)
    elif terminal == "hold":
        following = torch.where(actions == last, potential, following)
    return torch.where(mask, gamma * following - potential, 0.0)


# --------------------------------------------------------------------------------------------------
# TVKD.   L = -log sigmoid( beta [log-ratio_w - log-ratio_l] - alpha [sum_t psi_w - sum_t psi_l] )
#
# alpha > 0, "minus". The student is optimal for the shaped reward r + alpha psi. Its Bellman
#     equation gives   sum r = beta log-ratio - alpha sum psi + (prompt only).
# alpha < 0, "plus". Student and teacher together explain the label; the student learns what the
#     teacher leaves:  sum r = beta log-ratio + |alpha| sum psi + (prompt only).
# The label is Bradley-Terry on sum r, which gives L. With u = Phi(s_end) and unlimited labels the
# optimum is pi_ref exp((r + alpha u)/beta): minus adds what the teacher knows, plus leaves it out.
# So TVKD is DPO with a tilted reference, pi_ref exp(alpha u/beta): add alpha/beta u to ref_chosen
# and to ref_rejected, and any DPO loss gives the same numbers and gradients.

def tvkd_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, psi_chosen, psi_rejected,
              beta, alpha):
    """The TVKD loss of each pair: sequence log-probs (B,) in nats, summed psi (B,) -> (B,) nats.

    psi is a constant of the data: no gradient reaches it, nor the reference. alpha (psi_w - psi_l)
    is a margin offset of ODPO's form. The gradient weighs a pair by sigmoid(alpha dpsi - beta
    dlogratio), where dx = x_chosen - x_rejected. At the same policy that is more than DPO's weight
    exactly where alpha dpsi > 0. alpha = 0 is DPO.
    """
    _expect_shape(policy_chosen.shape, psi_chosen=psi_chosen, psi_rejected=psi_rejected)
    margin = _reward_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    offset = alpha * (psi_chosen - psi_rejected).detach()
    return -F.logsigmoid(margin - offset)


# --------------------------------------------------------------------------------------------------
# The baselines.   KD: mean over response states of KL(teacher || student)
#                  SFT, behaviour cloning: mean over response tokens of -log pi(a_t|s_t)

def kd_loss(student_logits, teacher_logits, mask):
    """KL(teacher || student), summed over the vocabulary, averaged over response states -> nats.

    student_logits, teacher_logits (B, T+1, V), mask (B, T). No gradient reaches the teacher. The
    last state is dropped: nothing is chosen there. A teacher's probability may be 0. Two sizes of V
    (two vocabularies) and an empty mask are refused.
    """
    _expect_shape(student_logits.shape, teacher_logits=teacher_logits)
    _expect_shape((student_logits.shape[0], student_logits.shape[1] - 1), mask=mask)
    mask = _non_empty(mask)
    student = _at_least_float32(student_logits[:, :-1][mask])           # (response tokens, V)
    teacher = _at_least_float32(teacher_logits.detach()[:, :-1][mask])
    divergence = F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="sum")
    return divergence / mask.sum()


def nll_loss(logps, mask):
    """Mean of -log pi(a_t|s_t) over response tokens: logps (B, T), mask (B, T) -> nats per token.

    An empty mask is refused.
    """
    _expect_shape(logps.shape, mask=mask)
    return -logps[_non_empty(mask)].mean()


def _non_empty(mask):
    if not mask.any():
        raise ValueError("mask: expected at least one response token, got none")
    return mask.bool()
