# Who is involved: the agent, the sponsor who answers for it, the task, the user it acts for, the target.
#
# How rules are written in this bundle: a helper says what must hold, and the rule denies where it does `not`. A field
# that is missing makes the helper undefined, and `not` of undefined is true: what cannot be shown is denied.
package ringfence.identity

deny contains reason(concat("_", ["agent", agent_status]), sprintf("agent %v is %v", [agent_id, agent_status])) if not agent_active

deny contains reason("agent_orphaned", "the agent has no active sponsor; transfer it first") if not sponsor_active

deny contains reason("task_ended", "the task has ended, or has no known end; have a new one assigned") if {
	not task_active
}

deny contains reason("task_other_agent", sprintf("the task was not assigned to agent %v", [agent_id])) if {
	not task_is_the_agents
}

deny contains reason("user_disabled", "the user whom the task is on behalf of is not active") if not user_active

deny contains reason("target_removed", "the target was removed") if not target_active

agent_active if input.agent.status == "active"

sponsor_active if {
	input.sponsor.user_id == input.agent.sponsor
	input.sponsor.status == "active"
	"sponsor" in input.sponsor.roles
}

task_active if {
	input.task.status == "active"
	input.now_s < input.task.not_after
}

task_is_the_agents if {
	input.task.agent_id == input.agent.agent_id
	input.task.task_id == named_task
}

# Named by the request for a credential, or by the lease that an action uses.
named_task := input.request.task_id

named_task := input.lease.task_id if not input.request

user_active if {
	input.user.user_id == input.task.on_behalf_of
	input.user.status == "active"
}

target_active if input.target.status == "active"

# Messages never rest on a field that may be missing: the denial itself would be undefined then, and gone.
agent_id := object.get(input, ["agent", "agent_id"], "unknown")

agent_status := object.get(input, ["agent", "status"], "unknown")

reason(code, message) := {"code": code, "message": message}
