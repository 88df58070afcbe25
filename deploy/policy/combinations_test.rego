package ringfence.combinations_test

import data.ringfence.combinations
import data.ringfence.fixture

test_good_request_is_not_denied if count(combinations.deny) == 0 with input as fixture.good

test_code_and_ci_at_once if {
	denied == {"combination"} with input as fixture.wanting(["clone", "run-ci"], ["web"])
}

test_writing_and_approving_at_once if {
	denied == {"combination"} with input as fixture.wanting(["push", "merge"], ["web"])
}

test_one_half_alone if {
	every verbs in [["read-code", "clone", "pull", "push"], ["run-ci", "merge"]] {
		count(combinations.deny) == 0 with input as fixture.wanting(verbs, ["web"])
	}
}

test_the_other_half_is_held if {
	denied == {"combination"} with input as holding(["pull"], "run-ci")
	denied == {"combination"} with input as holding(["run-ci"], "pull")
	some denial in combinations.deny with input as holding(["pull"], "run-ci")
	endswith(denial.message, "; give back lease 1 first")
}

test_two_halves_of_different_pairs if count(combinations.deny) == 0 with input as holding(["pull"], "merge")

# Nothing held is an empty list. Where there is no list, nobody knows what is held.
test_unknown_holdings_are_denied if {
	denied == {"held_unknown"} with input as fixture.without("held")
	denied == {"held_unknown"} with input as fixture.with_value("/held", {})
	denied == {"held_unknown"} with input as fixture.with_value("/held", [{"lease_id": "1"}])
}

# What an agent holds already is not held against another wish.
test_held_together_by_something_else if count(combinations.deny) == 0 with input as holding(["pull", "run-ci"], "read")

test_both_pairs_are_told if {
	found := {denial.message | some denial in combinations.deny} with input as fixture.wanting(
		["pull", "run-ci", "push", "merge"],
		["web"],
	)
	count(found) == 2
}

holding(verbs, wanted) := fixture.holding(fixture.wanting([wanted], ["web"]), "elsewhere", verbs)

denied := fixture.codes(combinations.deny)
