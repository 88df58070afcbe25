import time
from tests.runner.test_fleet import *

def test_x(fleet):
    run_id = fleet.order("--mount", "reports:rw", command="(sleep 6; echo $? ; date) > /workspace/reports/x 2>&1")
    t=time.time()
    print(fleet.ended(run_id), time.time()-t)
    print((fleet.reports/"x").read_text() if (fleet.reports/"x").exists() else None)
    d=fleet.here.run("--", "sh","-c","sleep 6; echo hi")
    print(d)
    run_id = fleet.order(command="sleep 6")
    t=time.time()
    print(fleet.ended(run_id), time.time()-t)
    print(fleet.logs())
    assert 0
