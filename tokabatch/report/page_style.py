"""How a report page looks: its style sheet, for wide and narrow, light and dark screens."""

CSS = """
:root{color-scheme:light dark;--page:#fff;--ink:#1f2328;--soft:#57606a;--line:#d0d7de;--bad:#b42318;--good:#1a7f37}
@media(prefers-color-scheme:dark){:root{--page:#0d1117;--ink:#e6edf3;--soft:#9198a1;--line:#30363d;--bad:#ff7b72;--good:#56d364}}
*{box-sizing:border-box}
body{font:15px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--page);
margin:2rem auto;max-width:78rem;padding:0 1rem}
h1{font-size:1.35rem;margin:0;overflow-wrap:anywhere}h1 small{display:block;font-size:.82rem;font-weight:400;color:var(--soft)}
h2{font-size:1.1rem;margin:1.8rem 0 .6rem}
p.sub{color:var(--soft);margin:.2rem 0 1.2rem;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(var(--columns),1fr);gap:.7rem;margin-bottom:1.4rem}
.tiles+p{font-size:.82rem;margin:-.7rem 0 1.4rem}
@media(max-width:60rem){.tiles{grid-template-columns:repeat(3,1fr)}}
@media(max-width:42rem){.tiles{grid-template-columns:1fr 1fr}}
.tile{border:1px solid var(--line);border-radius:.5rem;padding:.5rem .8rem}
.tile b{display:block;font-size:1.3rem}.tile span{color:var(--soft);font-size:.82rem}
.plots{display:flex;flex-wrap:wrap;gap:1rem}
.plots>*{flex:1 1 min(var(--least),100%);max-width:50rem;min-width:0}
.stack{display:flex;flex-direction:column;gap:1rem}.stack figure{flex:1}
figure{margin:0;border:1px solid var(--line);border-radius:.5rem;padding:.7rem;
container-type:inline-size;display:flex;flex-direction:column}
.bars{flex:1;display:grid;grid-template-columns:auto 1fr;gap:.5rem .7rem;align-content:center;font-size:.82rem}
.bars div{display:flex;gap:.4rem;align-items:center}.bars i{height:.9rem;min-width:1px}
figcaption{font-weight:600;margin-bottom:.3rem}figcaption small{font-weight:400;color:var(--soft);display:block}
svg{display:block;width:100%;height:auto}svg text{fill:var(--ink)!important}svg.narrow{display:none}
@container(max-width:27rem){svg.wide{display:none}svg.narrow{display:block}}
.bad{color:var(--bad)}.good{color:var(--good)}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.25rem .8rem .25rem 0;
border-bottom:1px solid var(--line);overflow-wrap:anywhere}th{font-weight:400;color:var(--soft);min-width:6rem}
table.errors{margin-bottom:1.4rem}.errors td:first-child{white-space:nowrap}
@media(max-width:42rem){.errors th{display:none}.errors tr{display:block;border-bottom:1px solid var(--line);padding:.35rem 0}
.errors td{display:inline;border:0}.errors td:nth-child(2):not(:empty)::before{content:"row "}
.errors td:last-child{display:block}}
.rows td:not(:last-child){white-space:nowrap}.rows td:nth-child(n+3):not(:last-child){white-space:normal;min-width:7rem}
.rows td:last-child{width:50%}.rows{margin-bottom:.6rem}
@media(max-width:42rem){.rows tr:first-child{display:none}.rows tr{display:block;
border-bottom:1px solid var(--line);padding:.35rem 0}
.rows td,.rows td:last-child{display:block;width:auto;border:0;padding:0 0 .1rem;white-space:normal}
.rows td:nth-child(-n+2){display:inline-block;margin-right:1.2rem}
.rows td::before{content:attr(data-name) ": ";color:var(--soft)}}
.facts td{white-space:pre-wrap}
details{border:1px solid var(--line);border-radius:.5rem;padding:.4rem .8rem;margin-bottom:.5rem}
details th{width:8rem}details td{white-space:pre-line}
@media(max-width:42rem){.keyed :is(tr,th,td){display:block;width:auto}.keyed th{border:0;padding-bottom:0}
.keyed td{padding-top:0}}
summary{cursor:pointer;overflow-wrap:anywhere}summary small,h2 small{color:var(--soft)}
h2 small{font-size:.82rem;font-weight:400}
summary div.prompt{color:var(--soft)}
summary div{font-size:.82rem;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
details[open]>summary div{display:none}
details details{padding:.2rem .6rem;margin:.5rem 0}
h3{font-size:.82rem;font-weight:400;color:var(--soft);margin:.6rem 0 0}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.45 ui-monospace,monospace;margin:.5rem 0}
"""
