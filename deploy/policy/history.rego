# What an agent does for the first time in 30 days, or could do far beyond what it does: its sponsor is asked.
# `input.history` tells those 30 days by target and verb; `input.held` what the agent holds now.
package ringfence.history

import data.ringfence.approval

# An agent is new for 7 days: its sponsor has just said what it may do, and there is no past to compare with.
new_for_s := 604800

# Its ceiling is compared with what it used once it has been there for all of the 30 days.
compared_after_s := 2592000

# A ceiling is far too wide where the agent never used so many of the verbs that it allows ...
many_unused := 12

# ... and these are so many times as many as those that it used.
times_the_used := 4

required contains "sponsor" if count(notes) > 0

# The first use of a target, even for reading.
notes contains {"code": "first_use", "message": sprintf("%v has not used %v in the last 30 days", [data.ringfence.identity.agent_id, input.target.target_id])} if {
	not is_new
	not target_used
}

# The first change of a kind at a target that was used for something else.
notes contains {"code": "first_use", "message": sprintf("%v has not done %v at %v in the last 30 days", [data.ringfence.identity.agent_id, verb, input.target.target_id])} if {
	not is_new
	target_used
	some permission in input.request.scope
	some verb in permission.verbs
	not approval.reading(verb)
	not verb_used(verb)
}

# Any change, while the agent could do far more than it does. Reading is not held up.
notes contains {"code": "ceiling_too_wide", "message": sprintf("%v used %v of the %v verbs that its ceiling allows; ringfence agent show proposes a narrower one", [data.ringfence.identity.agent_id, used_count, input.history.granted])} if {
	not too_early
	input.history.unused >= many_unused
	input.history.unused > times_the_used * used_count
	some permission in input.request.scope
	approval.changes_something(permission)
}

# What is not known would be a first use, or a ceiling too wide, and nobody could tell.
deny contains {"code": "history_unknown", "message": "what the agent used lately is not known"} if not history_known

history_known if {
	is_object(input.history.used)
	is_number(input.history.granted)
	is_number(input.history.unused)
}

# An agent of which nobody knows since when it has been there is not new.
is_new if input.now_s - input.agent.registered_at_s < new_for_s

too_early if input.now_s - input.agent.registered_at_s < compared_after_s

target_used if input.history.used[input.target.target_id]

target_used if {
	some lease in input.held
	some permission in lease.scope
	permission.target == input.target.target_id
}

verb_used(verb) if input.history.used[input.target.target_id][verb]

verb_used(verb) if {
	some lease in input.held
	some permission in lease.scope
	permission.target == input.target.target_id
	verb in permission.verbs
}

used_count := input.history.granted - input.history.unused
