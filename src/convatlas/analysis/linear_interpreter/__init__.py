"""Linear interpreters: a convolutional network at one input as an exact linear system plus a residual.

Navarrete Michelini, Liu, Lu, Jiang: "A Tour of Convolutional Networks Guided by Linear Interpreters", ICCV 2019,
arXiv 1908.05168.

A network takes decisions: which ReLUs pass, where the maximum of a pool lies, which statistics normalise. With those of
an input x0 frozen, it is linear but for its biases:

    y = A(x0) x0 + r(x0).

Column i of A is the response to an impulse at input i, row k the filter through which output k sees the input, and
row k times x0 the vote of each pixel for output k. The residual r is what the biases contribute.

`LinearInterpreter` records the frozen network of an x0 and replays it; `LinearScope` runs it beside the real one, as in
the paper, and stores nothing; `study` makes a report of it.
"""

from convatlas.analysis.linear_interpreter.interpreter import Interpretation, LinearInterpreter, Singular
from convatlas.analysis.linear_interpreter.pictures import study
from convatlas.analysis.linear_interpreter.replay import LinearScope
from convatlas.analysis.linear_interpreter.rules import Call, Frozen, register_rule

__all__ = [
    "Call",
    "Frozen",
    "Interpretation",
    "LinearInterpreter",
    "LinearScope",
    "Singular",
    "register_rule",
    "study",
]
