"""Change any model: exchange, insert and remove layers, and merge it into the form that is deployed.

Every function leaves the given model as it is and returns a changed copy in a `Surgery`, which also names what was
changed and what was not and why. Floors below: `convatlas.nn`.
"""

from convatlas.surgery.edit import insert, remove, swap
from convatlas.surgery.fold import merge
from convatlas.surgery.layers import place_layer
from convatlas.surgery.selection import Selector, Surgery

__all__ = ["Selector", "Surgery", "insert", "merge", "place_layer", "remove", "swap"]
