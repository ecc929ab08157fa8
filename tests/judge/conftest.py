"""Settings for the judge's tests."""

import hypothesis

# Examples are tiny; what takes longer than 200 ms is another program on the machine.
hypothesis.settings.register_profile("judge", deadline=None)
hypothesis.settings.load_profile("judge")
