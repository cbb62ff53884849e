"""What a model scores and costs, which operating points it has, and how fast it is."""
