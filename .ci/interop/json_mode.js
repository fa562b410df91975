// npm's @wecom/crypto plays WeCom against a running bot in JSON mode: json_mode.js PORT TOKEN KEY BOT_ID.
const { getSignature, encrypt, decrypt } = require('@wecom/crypto');
const [port, token, key, bot] = process.argv.slice(2);
const url = `http://127.0.0.1:${port}/weixin?`;
const pause = (ms) => new Promise((resolve) => { setTimeout(resolve, ms); });
let passed = 0;
let failed = 0;

function check(good, what) {
  if (good) { passed += 1; } else { failed += 1; console.log('@wecom/crypto, JSON: wrong:', what); }
}

function signed(text, id) {
  const sealed = encrypt(key, text, id);
  const timestamp = String(Math.floor(Date.now() / 1000));
  const nonce = String(Math.floor(Math.random() * 1e9));
  return { sealed, query: { msg_signature: getSignature(token, timestamp, nonce, sealed), timestamp, nonce } };
}

async function verify(echo) {
  const { sealed, query } = signed(echo, '');
  return (await fetch(url + new URLSearchParams({ ...query, echostr: sealed }))).text();
}

async function post(message) {
  const { sealed, query } = signed(JSON.stringify(message), '');
  const answer = await fetch(url + new URLSearchParams(query), { method: 'POST', body: JSON.stringify({ encrypt: sealed }) });
  if (answer.status !== 200) return answer.status;
  const envelope = await answer.json();
  const opened = decrypt(key, envelope.encrypt);
  check(getSignature(token, String(envelope.timestamp), envelope.nonce, envelope.encrypt) === envelope.msgsignature
    && opened.id === '' && envelope.nonce === query.nonce, envelope);
  return JSON.parse(opened.message);
}

function message(msgtype, fields) {
  return { msgid: `N${Date.now()}${Math.random()}`, aibotid: bot, chatid: 'wrGroup', chattype: 'group',
    from: { userid: 'node' }, msgtype, ...fields };
}

const event = (eventtype, data) => post(message('event', { event: { eventtype, [eventtype]: data } }));

(async () => {
  for (let i = 0; i < 100; i += 1) {
    const echo = String(1616140317555161061n + BigInt(i));
    check(await verify(echo) === echo, 'the verification');
    const text = '你好<&"\\😀'.repeat(i % 60) + i;
    const { stream } = await post(message('text', { text: { content: `@小助手 ${text}` } }));
    check(stream.content === text && stream.finish, stream);
  }
  const slow = message('text', { text: { content: '@小助手 慢慢地说完一句话' } });
  const [first, again] = await Promise.all([post(slow), post(slow)]);
  check(!first.stream.finish && again.stream.id === first.stream.id, first);
  const seen = [];
  let { stream } = first;
  while (!stream.finish && seen.length < 100) {
    await pause(50);
    ({ stream } = await post(message('stream', { stream: { id: first.stream.id } })));
    seen.push(stream.content);
  }
  check(seen[seen.length - 1] === '慢慢地说完一句话' && new Set(seen).size > 2, seen);
  check((await event('enter_chat', {})).text.content === '您好', 'enter_chat');
  const pressed = await event('template_card_event', { card_type: 'button_interaction', event_key: 'ok', task_id: 'T1' });
  check(pressed.response_type === 'update_template_card' && pressed.template_card.task_id === 'T1', pressed);
  check(JSON.stringify(await event('feedback_event', { id: 'F1', type: 1 })) === '{}', 'feedback_event');
  check(await post({ ...slow, from: undefined }) === 403, 'a message from nobody');
  console.log(`@wecom/crypto, JSON: ${passed} passed, ${failed} failed`);
  process.exit(failed ? 1 : 0);
})();
