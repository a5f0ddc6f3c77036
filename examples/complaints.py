"""Complaints to an online shop, each with a reference text written by hand: for training, and held out."""

from __future__ import annotations

# The split is fixed.
TRAIN: tuple[tuple[str, str], ...] = (
    (
        "My order is a week late.",
        "I'm sorry for the wait; I'll find out where your order is and keep you posted.",
    ),
    (
        "You sent me a blue shirt, but I ordered a green one.",
        "Sorry for the mix-up! We'll send you the green shirt today, and you can keep the blue one.",
    ),
    (
        "I was charged twice for the same order.",
        "I'm sorry about that; we'll refund the second charge to your card right away.",
    ),
    (
        "The shoes are too small.",
        "Happy to help! We'll gladly exchange your shoes for a larger size, free of charge.",
    ),
    (
        "The mug I bought has a crack.",
        "I'm so sorry about your mug! We'll send you a perfect new one tomorrow.",
    ),
    (
        "My discount code does not work.",
        "Sorry about the code! I'll take the discount off your order myself.",
    ),
    (
        "I can't log in to my account.",
        "Let me help you log in: I'm sending you a link to reset your password.",
    ),
    (
        "The headphones stopped working after two days.",
        "I'm sorry your headphones failed; we'll replace them for free under the warranty.",
    ),
    (
        "I want to cancel my order.",
        "Of course, I've cancelled your order, and your money will be back within three days.",
    ),
    (
        "The parcel says delivered, but I never got it.",
        "I'm sorry your parcel is missing; I'll ask the courier today and send another if it is lost.",
    ),
    ("There is no manual in the box.", "No problem, I'll gladly email you the manual as a file right now."),
    (
        "Your website keeps crashing when I try to pay.",
        "Sorry for the trouble! I can take your payment by phone while we fix the website.",
    ),
    (
        "I gave you the wrong delivery address.",
        "Thanks for telling us! I'll change the delivery address before your order leaves.",
    ),
    (
        "The lamp came without a bulb.",
        "Sorry we forgot the bulb! We'll post one to you today at no cost.",
    ),
    (
        "I have waited three weeks for my refund.",
        "I'm sorry your refund took so long; I'll have the money sent to your bank today.",
    ),
    (
        "The sofa has a big stain on the seat.",
        "I'm sorry about the stain! We'll send someone to clean your sofa or replace the cover.",
    ),
    (
        "The courier was rude to me.",
        "I'm really sorry you were treated that way; I'll speak with the courier's manager today.",
    ),
    (
        "Two of the six glasses were missing.",
        "I'm sorry two glasses were missing; we'll send you both of them today, free of charge.",
    ),
    (
        "My phone does not charge with the cable you sold me.",
        "Sorry about the cable! I'll send you the right charger for your phone today.",
    ),
    (
        "I keep getting emails that I never asked for.",
        "Sorry about those emails! I'm taking you off our mailing list right now.",
    ),
    (
        "The dress looks nothing like the picture.",
        "I'm sorry the dress let you down; please send it back for free and we'll refund you in full.",
    ),
    (
        "The toaster smells of burning plastic.",
        "Please unplug the toaster to stay safe; we'll collect it and send you a new one.",
    ),
    (
        "I ordered one book and you sent me three.",
        "Thanks for your honesty! Keep one book, and we'll collect the other two for free.",
    ),
    (
        "The paint is the wrong shade of white.",
        "Sorry about the shade! Tell me which white you need and we'll swap the paint for free.",
    ),
    (
        "My gift card shows no money on it.",
        "I'm sorry about your gift card; I'll load the full amount onto it right now.",
    ),
    (
        "The table is missing four screws.",
        "Sorry about the screws! We'll post all four to you today so you can finish your table.",
    ),
    (
        "The milk in my grocery box was sour.",
        "I'm so sorry about the sour milk; I'll refund it and put fresh milk in your next box.",
    ),
    (
        "Nobody answers your phone.",
        "I'm sorry no one picked up! Please give me your number and I'll call you myself.",
    ),
    (
        "The plant I ordered arrived dead.",
        "I'm so sorry about your plant! We'll send you a healthy new one, packed with more care.",
    ),
    (
        "The price went down the day after I bought it.",
        "Good news: I can refund you the difference to the new price today.",
    ),
    (
        "The zip on my new jacket is stuck.",
        "I'm sorry about the zip! We'll repair your jacket or swap it for free, as you like.",
    ),
    (
        "My invoice has the wrong company name.",
        "Sorry about that! I'll correct the company name and email you a new invoice today.",
    ),
    (
        "The kettle leaks water all over the kitchen.",
        "I'm sorry about the mess! Please stop using the kettle, and we'll send a new one tomorrow.",
    ),
    (
        "I received somebody else's order.",
        "Sorry for the mix-up! We'll collect that parcel and send your own order by express.",
    ),
    (
        "My subscription was renewed although I cancelled it.",
        "I'm sorry about that; I'll end your subscription now and refund the renewal.",
    ),
    (
        "The mattress is much too hard for me.",
        "No worries, you can try a softer mattress, and we'll collect the hard one for free.",
    ),
    (
        "The app logs me out every few minutes.",
        "Sorry about the app! Please install today's update, which keeps you logged in.",
    ),
    (
        "The watch shows the wrong time every morning.",
        "I'm sorry your watch is slow; send it to us for free and we'll repair it within a week.",
    ),
    (
        "Half of the chocolates had melted.",
        "I'm so sorry about the chocolates! We'll send you a fresh box in a cool pack.",
    ),
    (
        "I need my order before Friday, and it has not shipped.",
        "I understand; I'll upgrade you to express delivery so that it arrives by Thursday.",
    ),
)
HELD_OUT: tuple[tuple[str, str], ...] = (
    (
        "My package arrived broken.",
        "I'm so sorry about that! We'll send you a new one today, free of charge.",
    ),
    (
        "The trousers are too long for me.",
        "No problem, we'll gladly exchange your trousers for a shorter pair at no cost.",
    ),
    (
        "I paid for express delivery, but it took ten days.",
        "I'm sorry it was so slow; I'll refund what you paid for express delivery.",
    ),
    (
        "The coffee machine does not turn on.",
        "I'm sorry about your coffee machine! We'll replace it for free and collect the old one.",
    ),
    (
        "I forgot my password, and the reset email never comes.",
        "Let me help: I'll send a new reset link to your email right now.",
    ),
    (
        "One of the chairs has a broken leg.",
        "I'm sorry about the chair! We'll send you a new leg or a whole new chair.",
    ),
    (
        "You sent me the wrong colour of curtains.",
        "Sorry for the mix-up! We'll send you curtains in the right colour today.",
    ),
    (
        "I have not received my refund yet.",
        "I'm sorry for the delay; I'll make sure your refund is paid today.",
    ),
    (
        "The batteries for the toy were not in the box.",
        "Sorry we left out the batteries! We'll post a set to you today.",
    ),
    (
        "The fridge makes a loud noise all night.",
        "I'm sorry about the noise! I'll send a technician to look at your fridge this week.",
    ),
    (
        "I would like to return this camera.",
        "Of course, I'll email you a free return label, and you'll get your money back.",
    ),
    (
        "The flowers had wilted when they came.",
        "I'm so sorry about the flowers! We'll deliver a fresh bouquet to you tomorrow.",
    ),
)
