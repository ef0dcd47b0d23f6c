"""Skips the weight gradients of neurons that are certain not to move in the next step.

* bound.py: for how many steps a neuron stays frozen, whatever the data, and why.
* certificate.py: a certificate says which rows of a layer's weight may move, and until which step.
* record.py: the state after the last step, to detect changes by other code.
* forward.py replaces a module's forward, and gradients.py its backward pass.
* rows.py: the rows whose gradients a backward pass computes.
* constants.py: if no row of the first layer can move, the layer rests, and back-propagation ends behind it.
* install.py installs all this in a model.
"""
