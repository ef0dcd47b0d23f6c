"""Weight gradients that are not computed, because their neurons are certain not to move in the coming step.

* bound.py: how long a neuron stays frozen whatever the data, and why.
* certificate.py: a certificate says which rows of a layer's weight may move, and until which step.
* record.py: what the last step left, to notice changes by other code.
* forward.py takes the place of a module's forward, and gradients.py of its backward pass.
* rows.py: the rows that a backward pass computes.
* constants.py: a first layer of which no row can move rests, so that back-propagation ends behind it.
* install.py places all this in a model.
"""
