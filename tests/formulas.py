"""The methods' losses written out in float64 numpy, and tensors to compare with them."""

import numpy as np
import torch


def log_softmax(z_BC):
    z_BC = np.asarray(z_BC, np.float64)
    z_BC = z_BC - z_BC.max(axis=1, keepdims=True)
    return z_BC - np.log(np.exp(z_BC).sum(axis=1, keepdims=True))


def softmax(z_BC):
    return np.exp(log_softmax(z_BC))


def onehot(labels, c):
    return np.eye(c)[np.asarray(labels)]


def cross_entropy(z_BC, t_BC):
    """Of each sample."""
    return -(t_BC * log_softmax(z_BC)).sum(axis=1)


def smoothed(hard_BC, eps, convention):
    c = hard_BC.shape[1]
    if convention == "k":
        return (1 - eps) * hard_BC + eps / c
    return (1 - eps) * hard_BC + eps * (1 - hard_BC) / (c - 1)


def kl(q_BC, z_BC, temperature=1.0):
    """KL(q || softmax(z / T)) of each sample; 0 log 0 is 0."""
    log_q_BC = np.log(q_BC, where=q_BC > 0, out=np.zeros_like(q_BC))
    return (q_BC * (log_q_BC - log_softmax(np.asarray(z_BC) / temperature))).sum(axis=1)


def made_by_hand(hard_BC, temperature):
    """TF-KD reg: softmax of 0.99 on the label, the rest shared, over T."""
    c = hard_BC.shape[1]
    return softmax((0.99 * hard_BC + 0.01 / (c - 1) * (1 - hard_BC)) / temperature)


def tensor(values, requires_grad=False):
    return torch.tensor(np.asarray(values), dtype=torch.float64, requires_grad=requires_grad)
