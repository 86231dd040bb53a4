"""Everything that is settled before the first step: the model that is opened, the samples that it is to draw."""
