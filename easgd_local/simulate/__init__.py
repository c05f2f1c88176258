"""Up to 4096 workers in one process on a virtual clock: the rules themselves, run by greenlets.

from easgd_local.simulate.machine import Machine
from easgd_local.simulate.problems import make_problem
from easgd_local.simulate.simulation import Scenario, simulate
outcome = simulate(Scenario(rule=EASGD(tau=10), workers=1024), make_problem("quadratic"), Machine(step_s=0.1))
"""
