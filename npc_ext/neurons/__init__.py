"""The neurons of a model: their parameters, where their activation is measured, and how."""
