"""A program of a user, for type checkers at their strictest. `type: ignore` marks what they must refuse."""
# pyright: strict
import pathlib
from typing import Any, AsyncIterator, Dict, Iterator, List, Optional, Tuple

from typing_extensions import assert_type

import easywechat


def reply_func(param_dict: Dict[str, Any]) -> Dict[str, Any]:
    return param_dict


server = easywechat.WeChatServer('demo', needs=('secret', 'touser'), only_touser=True)
assert_type(server.register_callback('text', reply_func)(dict()), Dict[str, Any])


@server.register_callback('text', pattern='temperature (.+)')
def temperature(msg: Dict[str, Any], room: str) -> str:
    return room + ' 21'


assert_type(temperature({}, 'x'), str)


@server.register_callback('image')
async def image(msg: Dict[str, Any]) -> Optional[str]:
    return None


@server.register_callback('*')
async def others(msg: Dict[str, Any]) -> AsyncIterator[str]:
    yield msg['MsgType']


@server.register_callback('event:click')                # type: ignore[type-var]
def several(msg: Dict[str, Any]) -> Iterator[object]:
    yield from ['x', pathlib.Path('cam.jpg')]


class Monitor:
    def photo(self, msg: Dict[str, Any]) -> List[pathlib.Path]:
        return [pathlib.Path('cam.jpg')]


server.register_callback('event:enter_agent', Monitor().photo)
server.register_callback('voice', lambda msg: 7)        # type: ignore[type-var]
server.register_callback('text', None)                  # type: ignore[call-overload]


class Patient(easywechat.WeChatServer):
    answer_within, max_callbacks = 4.25, 8


class Hasty(easywechat.WeChatClient):
    pause, call_within = 0.5, 2.5


def progress(sent: int, total: int) -> None:
    print(sent, total)


@server.register_callback('text', pattern='talk')
def talk(msg: Dict[str, Any]) -> easywechat.Stream:
    return easywechat.Stream(piece for piece in ['one', 'two'])


@server.register_callback('text', pattern='think')
async def think(msg: Dict[str, Any]) -> easywechat.Stream:
    async def pieces() -> AsyncIterator[str]:
        yield 'one'
    return easywechat.Stream(pieces())


easywechat.Stream([1])                                  # type: ignore[list-item]
assert_type(server.connected, bool)
assert_type(server.send('91%', to='zhangsan'), Dict[str, Any])
assert_type(server.bot.send(pathlib.Path('cam.jpg'), to=['zhangsan', 'lisi']), Dict[str, Any])
assert_type(server.download({'MediaId': 'M'}, 'folder'), pathlib.Path)
assert_type(easywechat.WeChatBot('demo').upload('cam.jpg'), str)
easywechat.get_sender('demo').send('91%')

client = easywechat.WeChatClient('demo', store=easywechat.MemoryStore())
client.progress = progress
client.retry_within = 1.5
client.progress = print
client.progress = 'x'                                   # type: ignore[assignment]
assert_type(client.send(['text', {'msgtype': 'text'}, pathlib.Path('x')], to=['a', 'b'], safe=1), Dict[str, Any])
assert_type(client.send('x', party=2, tag={'a'})['msgid'], Any)
assert_type(client.upload('x.jpg', 'image'), str)
assert_type(client.download('id'), pathlib.Path)
assert_type(client.call('user/get', userid='x'), Dict[str, Any])
assert_type(client.send_media('text', 'x', 'a'), Dict[str, Any])
assert_type(client.trusted, Optional[bool])
assert_type(server.handle('GET', '/weixin'), Tuple[int, List[Tuple[str, str]], bytes])
assert_type(server.wxcpt.VerifyURL('', '', '', ''), Tuple[int, Optional[str]])
assert_type(server.start(port=0), Optional[Tuple[str, int]])
assert_type(easywechat.get_config('demo')['corpid'], str)
client.send(7)                                          # type: ignore[arg-type]
with easywechat.fetch('https://example.com') as answer:
    assert_type((answer.status, answer.read()), Tuple[int, bytes])
try:
    easywechat.WeChatRobot('key').send('x', mention='@all')
except easywechat.NetworkError as e:
    assert_type((e.errcode, e.errmsg, e.hint, e.maybe_sent), Tuple[int, str, str, bool])
def main() -> None:
    server.run(host='0.0.0.0', port=8000, debug=False)


if __name__ == '__main__':
    easywechat.command(main)
