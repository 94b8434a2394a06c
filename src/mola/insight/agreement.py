"""Whether modules sort tokens in the same way, although each numbers its experts for itself."""

from collections.abc import Sequence

import torch

from mola.insight.recording import ModuleGates


class AgreementCounter:
    """Counts, for every pair of modules, how often their first choices meet: all contingency tables at once.

    Modules that see another number of tokens than the first one does in some pass, such as the experts of a MoE base,
    are left out.
    """

    def __init__(self) -> None:
        self.modules: list[str] = []
        self._num_experts: list[int] = []
        self._meetings: torch.Tensor | None = None  # before the first pass

    def add(self, recorded: Sequence[ModuleGates]) -> None:
        """Count the tokens of one forward pass; those of modules that ran several times once for each run."""
        calls: dict[str, list[torch.Tensor]] = {}
        for each in recorded:
            calls.setdefault(each.module, []).append(each.gates)
        by_name = {name: torch.cat(gates) for name, gates in calls.items()}
        rows = len(next(iter(by_name.values()))) if by_name else 0
        if self._meetings is None:
            same = {name: gates.shape[1] for name, gates in by_name.items() if len(gates) == rows}
            self.modules = list(same)
            self._num_experts = list(same.values())
            width = sum(self._num_experts)
            self._meetings = torch.zeros(width, width, dtype=torch.float64)
        elif len(still := [name for name in self.modules if len(by_name.get(name, ())) == rows]) < len(self.modules):
            self._keep(still)
        choices = [
            torch.nn.functional.one_hot(by_name[name].argmax(1), width)
            for name, width in zip(self.modules, self._num_experts, strict=True)
        ]
        if choices:
            one_hot = torch.cat(choices, 1).float()  # (N, sum of E); sums of ones are exact
            self._meetings += one_hot.t() @ one_hot

    def _keep(self, names: Sequence[str]) -> None:
        """Forget the other modules."""
        numbers = dict(zip(self.modules, self._num_experts, strict=True))
        kept = torch.cat([torch.full((number,), name in names) for name, number in numbers.items()])
        self.modules, self._num_experts = list(names), [numbers[name] for name in names]
        assert self._meetings is not None
        self._meetings = self._meetings[kept][:, kept]

    def cramers_v(self) -> torch.Tensor:
        r"""Cramér's V of every pair of modules over the counted tokens.

            V_ab = sqrt(chi^2 / n / (min(k_a, k_b) - 1)),   chi^2 / n = sum_ij n_ij^2 / (n_i n_j) - 1

        with `n_ij` how many tokens module `a` gives to expert `i` first and `b` to `j`, and `k` the number of experts
        that are some token's first choice. 1: either choice follows from the other (from the finer one, where the
        numbers differ); 0: they have nothing to do with each other, also where a module has one choice for all tokens.

        Returns:
            float64 `(M, M)`, symmetric, 1 on the diagonal.
        """
        if not self.modules or self._meetings is None:
            return torch.zeros(0, 0, dtype=torch.float64)
        counts = self._meetings.diagonal()
        expected = counts.unsqueeze(0) * counts.unsqueeze(1)
        shares = torch.where(expected > 0, self._meetings.square() / expected.clamp(min=1), 0.0)
        modules = torch.arange(len(self.modules)).repeat_interleave(torch.tensor(self._num_experts, dtype=torch.long))
        membership = torch.nn.functional.one_hot(modules, len(self.modules)).double()
        squared = membership.t() @ shares @ membership - 1
        squared = (squared + squared.t()) / 2  # roundings differ
        used = membership.t() @ (counts > 0).double()
        least = torch.minimum(used.unsqueeze(0), used.unsqueeze(1)) - 1
        association = (squared.clamp(min=0) / least.clamp(min=1)).sqrt().clamp(max=1)
        return torch.where(least > 0, association, 0.0).fill_diagonal_(1.0)
