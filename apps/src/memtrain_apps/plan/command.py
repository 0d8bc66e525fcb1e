"""``plan``: make a plan, and say it."""

import json

from memtrain_common.console import Console

from .arms import Plan
from .config import PlanConfig
from .plan import make_plan
from .table import as_json, measured_table, table_of


def run_plan(config: PlanConfig) -> Plan:
    """Plan, and print the answer.

    Raises:
        UserError: if the model is unknown, or nothing fits by any choice or batch.
    """
    console = Console()
    plan = make_plan(config, console)
    console.say(json.dumps(as_json(plan), indent=1) if config.json else table_of(plan))
    if config.measure:
        console.say(measured_table(plan))
    return plan
