# What is asked for. Whether the scope is within the task, the agent's ceiling and the user's entitlements is decided
# by code before this bundle is asked, down to the resource, and denies whatever is said here. Its findings are in
# `input.lacking`, so that one place gives all the reasons.
package ringfence.scope

# These two stand against an action too.
lacking contains lack if some lack in input.lacking

lacking contains {"code": "scope_unchecked", "message": "nobody checked the scope against task, ceiling and entitlements"} if {
	not checked
}

deny contains lack if some lack in lacking

deny contains {"code": "scope_empty", "message": "the request asks for nothing"} if not something_asked

deny contains {"code": "several_targets", "message": "a request is for one target"} if not one_target

checked if is_array(input.lacking)

something_asked if count(input.request.scope) > 0

one_target if {
	every permission in input.request.scope {
		permission.target == input.target.target_id
	}
}
