"""A group of rows as the host knows it: what runs next, what is learnt, and groups that together are the whole."""

from runtime.execution.prompts.piece import Piece
from runtime.generation.conversation import Conversation
from runtime.generation.generation_request import GenerationRequest, Step


def request(**options: object) -> GenerationRequest:
    prompts = [[1, 2, 3, 4, 5], [6, 7], [8]]
    return GenerationRequest.of(prompts, None, {"max_new_tokens": 3, **options}, eos_token_id=(9,))


def test_prompts_come_in_pieces_and_shorter_ones_repeat_their_last_token() -> None:
    pieces = list(Conversation(request(), vocab_size=20).prompt_pieces(2))
    assert pieces == [
        Piece([[1, 2], [6, 7], [8]], [0, 0, 0], (True, True, True), (False, True, True)),
        Piece([[3, 4], [7], [8]], [2, 1, 0], (True, False, False), (False, False, False)),
        Piece([[5], [7], [8]], [4, 1, 0], (True, False, False), (True, False, False)),
    ]


def test_a_sequence_that_has_ended_stays_where_it_is() -> None:
    conversation = Conversation(request(), vocab_size=20)
    assert conversation.learn([10, 9, 11], [-0.5, -1.0, -2.0]) == Step((10, 9, 11), (-0.5, -1.0, -2.0))
    assert conversation.next_piece() == Piece([[10], [9], [11]], [5, 2, 1], (True, False, True))
    assert conversation.learn([12, 13, 9]) == Step((12, None, 9), None)
    assert conversation.texts == [[1, 2, 3, 4, 5, 10, 12], [6, 7, 9], [8, 11, 9]]
    assert not conversation.is_over
    assert conversation.learn([14, 14, 14]) == Step((14, None, None), None)
    assert conversation.is_over


def test_groups_of_rows_are_the_whole() -> None:
    whole = Conversation(request(request_ids=[5, 6, 7]), vocab_size=20)
    groups = [
        Conversation(request(request_ids=[5, 6, 7]), vocab_size=20, rows=rows) for rows in (slice(0, 1), slice(1, 3))
    ]
    assert [number for group in groups for number in group.request_ids] == whole.request_ids == [5, 6, 7]
    for tokens in ([10, 11, 9], [9, 12, 13], [14, 15, 16]):
        whole.learn(tokens)
        groups[0].learn(tokens[:1])
        groups[1].learn(tokens[1:])
        assert [text for group in groups for text in group.texts] == whole.texts
        joined = [group.next_piece() for group in groups]
        assert joined[0].starts + joined[1].starts == whole.next_piece().starts
        assert joined[0].active + joined[1].active == whole.next_piece().active
    assert all(group.is_over for group in groups)
    assert whole.is_over
