"""The neurons of a model: which parameters they have, where they are measured, and how."""
