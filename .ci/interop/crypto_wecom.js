// npm's @wecom/crypto plays WeCom against a running --echo: crypto_wecom.js PORT.
const { getSignature, encrypt, decrypt } = require('@wecom/crypto');
const token = 'EasyWeChatDemo';
const key = 'EasyWeChatDemoKeyIsPublicDoNotUseItAnywhere';
const corpid = 'wwEasyWeChatDemo00';
const url = `http://127.0.0.1:${process.argv[2]}/weixin?`;
const field = (xml, name) => xml.match(new RegExp(`<${name}>(?:<!\\[CDATA\\[)?(.*?)(?:\\]\\]>)?</${name}>`))[1];

function signed(text) {
  const sealed = encrypt(key, text, corpid);
  const timestamp = String(Math.floor(Date.now() / 1000));
  const nonce = String(Math.floor(Math.random() * 1e9));
  return { sealed, query: { msg_signature: getSignature(token, timestamp, nonce, sealed), timestamp, nonce } };
}

async function verify(echo) {
  const { sealed, query } = signed(echo);
  const answer = await fetch(url + new URLSearchParams({ ...query, echostr: sealed }));
  return (await answer.text()) === echo;
}

async function deliver(text, id, json) {
  const { sealed, query } = signed(`<xml><ToUserName>${corpid}</ToUserName><FromUserName>node</FromUserName>`
    + `<CreateTime>${Math.floor(Date.now() / 1000)}</CreateTime><MsgType>text</MsgType><Content><![CDATA[${text}]]></Content>`
    + `<MsgId>${id}</MsgId></xml>`);
  const body = json ? JSON.stringify({ encrypt: sealed }) : `<xml><Encrypt><![CDATA[${sealed}]]></Encrypt></xml>`;
  const xml = await (await fetch(url + new URLSearchParams(query), { method: 'POST', body })).text();
  const [reply, nonce, stamp] = ['Encrypt', 'Nonce', 'TimeStamp'].map((name) => field(xml, name));
  const opened = decrypt(key, reply);
  return getSignature(token, stamp, nonce, reply) === field(xml, 'MsgSignature') && opened.id === corpid
    && opened.message.includes(`<Content><![CDATA[${text}]]></Content>`);
}

(async () => {
  let passed = 0;
  let failed = 0;
  for (let i = 0; i < 300; i++) {
    const text = '你好<&😀'.repeat(i % 60) + i;
    for (const good of [await verify(String(1616140317555161061n + BigInt(i))),
      await deliver(text, `${Date.now()}${i}`, i % 2)]) {
      if (good) passed++; else failed++;
    }
  }
  console.log(`@wecom/crypto: ${passed} passed, ${failed} failed`);
  process.exit(failed ? 1 : 0);
})();
